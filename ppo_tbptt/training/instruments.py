"""The callback that measures how gradients and states fare through time, and the figure of the gradients."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ppo_tbptt.ppo.instruments import (
    VANISHED,
    Ratios,
    every_nth_env,
    horizon,
    measure,
    measuring,
    quotient,
    scalars,
    stale_kl,
    state_drift,
)
from ppo_tbptt.ppo.refresh import recomputed_states
from ppo_tbptt.ppo.sequences import gather
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.types import Rollout, Targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Instruments(Callback):
    """Measures ``memory/*`` every ``train.instruments_every`` iterations (:mod:`ppo_tbptt.ppo.instruments`).

    Each rank measures on one of every ``ppo.num_minibatches`` of its environments, about a minibatch of steps; the
    figures are over all ranks. Gradients, saturation and the states' norm are measured before the first epoch, with the
    weights that collected the rollout; staleness after each epoch. ``memory/state_drift`` and ``memory/stale_kl`` are
    the last epoch's, with ``_epoch0`` and so on those of each. An agent without memory has none of these. The histogram
    of lengths and the figure, in TensorBoard, are of rank 0's whole rollout and of all ranks.
    """

    def __init__(self) -> None:
        self._measured: dict[str, Ratios] = {}
        self._seconds = 0.0

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Measure gradients and states before the first epoch."""
        if epoch or not _due(iteration):
            return
        self._measured, self._seconds = {}, 0.0
        trainer = iteration.trainer
        if trainer.agent.core.state_size:
            with self._measuring(iteration):
                rollout, targets = _some_envs(iteration)
                self._measured = measure(trainer.agent, rollout, targets, trainer.learner.ppo_loss(trainer.env_steps))

    def after_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Measure how stale the stored states are."""
        if not _due(iteration) or not self._measured:
            return
        agent, learner = iteration.trainer.agent, iteration.trainer.learner
        with self._measuring(iteration), torch.no_grad():
            rollout, targets = _some_envs(iteration)
            fresh = replace(rollout, state=recomputed_states(agent, rollout))
            sequences = learner.cut(rollout)
            ids = torch.arange(len(sequences.lengths))
            of_fresh, of_stale = (
                learner.unroll(gather(x, targets, sequences, ids))[1].logits for x in (fresh, rollout)
            )
            self._measured |= {
                f"state_drift_epoch{epoch}": state_drift(rollout.state.kept(), fresh.state.kept())[None],
                f"stale_kl_epoch{epoch}": stale_kl(of_fresh, of_stale, agent.action_nvec)[None],
            }

    def after_iteration(self, iteration: Iteration) -> None:
        """Add up the figures of all ranks, and write the figures that are no scalars."""
        if not _due(iteration):
            return
        with self._measuring(iteration):
            writer, env_steps = iteration.trainer.writer, iteration.env_steps
            if writer is not None:
                lengths = iteration.trainer.learner.cut(iteration.rollout).lengths.float()
                writer.write_tensorboard(lambda board: board.histograms({"sequence_length": lengths}, env_steps))
            if self._measured:
                measured = _over_ranks(iteration.trainer.world, self._measured)
                iteration.scalars |= scalars(measured)
                if writer is not None:
                    _write_figure(writer, quotient(measured["gradient"]), iteration)
        iteration.scalars["time/instruments_seconds"] = self._seconds

    @contextmanager
    def _measuring(self, iteration: Iteration) -> Iterator[None]:
        began = perf_counter()
        with measuring(iteration.trainer.agent):
            yield
        self._seconds += perf_counter() - began


def _due(iteration: Iteration) -> bool:
    every = iteration.trainer.config.train.instruments_every
    return bool(every) and iteration.number % every == 0


def _some_envs(iteration: Iteration) -> tuple[Rollout, Targets]:
    return every_nth_env(iteration.rollout, iteration.targets, iteration.trainer.config.ppo.num_minibatches)


def _over_ranks(world: World, measured: dict[str, Ratios]) -> dict[str, Ratios]:
    """Add up the figures of all ranks; where their longest sequences differ, shorter ones are padded with zeros."""
    gradient = measured["gradient"]
    missing = world.largest(len(gradient)) - len(gradient)
    rows = measured | {"gradient": F.pad(gradient, (0, 0, 0, missing))}
    total = world.sum_(torch.cat(list(rows.values())))
    return dict(zip(rows, total.split([len(x) for x in rows.values()]), strict=True))


def _write_figure(writer: RunWriter, curve: Float[Tensor, "L"], iteration: Iteration) -> None:
    core = iteration.trainer.config.core.kind
    figure, file = draw_gradients(curve, title=f"{core} after {iteration.env_steps:,} steps"), io.BytesIO()
    figure.savefig(file, format="png")
    width, height = (int(x) for x in figure.get_size_inches() * figure.dpi)
    writer.write_tensorboard(
        lambda board: board.image("memory/gradient", file.getvalue(), width, height, iteration.env_steps)
    )


def draw_gradients(curve: Float[Tensor, "L"], *, title: str) -> "Figure":
    """Draw the gradient's norm by the number of steps that it goes back, in units of that at 0 (see :func:`decay`)."""
    # Imported here, because training without instruments needs no matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.13, 0.15, 0.84, 0.75))
    shown = torch.where(curve.isfinite() & (curve > 0), curve, torch.nan)
    axes.semilogy(shown.numpy(), "-o", color="#0072B2", linewidth=1.5, markersize=3)
    axes.axhline(VANISHED, color="0.4", linestyle=(0, (5, 2)), linewidth=1, label=f"horizon: {horizon(curve)}")
    axes.set_xlabel("k, steps back")
    axes.set_ylabel("norm of d loss(t) / d state(t - k), 1 at k = 0")
    axes.minorticks_off()  # measuring their labels would take most of the time
    axes.grid(color="0.9", linewidth=0.6)
    figure.text(0.13, 0.93, title, fontsize=10)  # as a title of the axes it would be placed by measuring all else
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure
