"""The update: epochs over minibatches of whole sequences."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ppo_tbptt.config import REGULARIZED, ConfigError, PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.models.compile import Encode
from ppo_tbptt.models.cores import GRU, ReluRNN, TanhRNN, Wrapper
from ppo_tbptt.models.cores.recurrence import Trace
from ppo_tbptt.ppo.advantages import Moments, normalize
from ppo_tbptt.ppo.all_reduce import Part, all_reduce_gradients, all_reduce_moments, all_reduce_steps
from ppo_tbptt.ppo.gradients import clip_gradients, jacobian_norm
from ppo_tbptt.ppo.losses import AuxiliaryLoss, Figures, PPOLoss, total_loss
from ppo_tbptt.ppo.refresh import burnt_in, recomputed_states
from ppo_tbptt.ppo.sequences import cut, cut_fraction, gather, only_counted, padding_fraction, split
from ppo_tbptt.runtime.device import tf32
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.errors import RunError
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import AgentOutput, Minibatch, Rollout, Sequences, Targets

EpochHook = Callable[[int], object]
"""Called with the number of the epoch, from 0 on. It may change the rollout's tensors in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """Figures of one update, over all ranks."""

    scalars: dict[str, float]
    """By tag. Losses and the like are means over the steps of all minibatches; absent where all were skipped."""
    num_updates: int
    """Minibatches, those that were skipped included."""
    num_nonfinite: int
    """Minibatches that were skipped because a figure of theirs, or their gradient, was NaN or infinite."""


class NonFiniteError(RunError):
    """Too many updates in a row had a loss or gradient that was NaN or infinite; the weights are those before them.

    minibatch: the (last) one it happened with, None where this rank had no part in it.
    """

    def __init__(self, message: str, minibatch: Minibatch | None) -> None:
        super().__init__(message)
        self.minibatch = minibatch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What became of one minibatch."""

    part: Part
    tags: tuple[str, ...]
    figures: Float[Tensor, "_"]
    """By tag, over all ranks, still on the device."""
    skipped: Bool[Tensor, ""]


class Learner:
    """Owns the optimiser and the order of the minibatches.

    Each rank of ``world`` updates on its own rollout, and all step alike (see :mod:`ppo_tbptt.ppo.all_reduce`).

    An update whose loss or gradient is not finite is skipped: neither weights nor the optimiser's state change.

    Args:
        agent: what is trained.
        config: the config's ``[ppo]``.
        total_steps: where schedules without a span of their own end.
        generator: of the permutations, on the CPU.
        world: the ranks.
        max_nonfinite: so many skipped updates in a row, over the end of an iteration too, are an error.
        auxiliary: losses beside PPO's. The parameters of those that are modules are trained too.

    Raises:
        ConfigError: ``jacobian_norm_coef`` is not 0, and the agent's core is none that it can regularise.
    """

    def __init__(
        self,
        agent: Agent,
        config: PPOConfig,
        *,
        total_steps: int,
        generator: torch.Generator,
        world: World | None = None,
        max_nonfinite: int = 10,
        auxiliary: Sequence[AuxiliaryLoss] = (),
    ) -> None:
        self.agent = agent
        self.config = config
        self.total_steps = total_steps
        self.generator = generator
        self.world = world or World()
        self.max_nonfinite = max_nonfinite
        self.auxiliary = list(auxiliary)
        self.loss_modules = {aux.name: aux.loss for aux in auxiliary if isinstance(aux.loss, nn.Module)}
        self.encode: Encode | None = None
        """The encoder where it is compiled."""
        self._nonfinite_in_a_row = 0
        self._traced: Callable[[], AbstractContextManager[list[Trace]]] = partial(nullcontext, [])
        core = agent.core
        while isinstance(core, Wrapper):
            core = core.core
        if config.jacobian_norm_coef:
            if not isinstance(core, GRU | TanhRNN | ReluRNN):
                text = f"{config.jacobian_norm_coef} is not possible with the core {type(core).__name__}"
                remedy = f"must be 0, or the core one of {', '.join(REGULARIZED)}"
                raise ConfigError(f"ppo.jacobian_norm_coef: {text}; {remedy}")
            self._traced = core.traced
        undecayed = agent.core.undecayed()
        others = [p for p in self.parameters() if all(p is not q for q in undecayed)]
        groups: list[dict[str, Any]] = [{"params": others}]
        if undecayed:  # in front, so that the agent's parameters keep the lowest numbers
            groups.insert(0, {"params": undecayed, "weight_decay": 0.0})
        # Every update sets the learning rate.
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained: the agent's parameters, then the losses'."""
        modules = (self.agent, *self.loss_modules.values())
        return list(dict.fromkeys(p for module in modules for p in module.parameters()))

    # --- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the optimiser's state, and the weights of losses by name."""
        losses = {name: module.state_dict() for name, module in self.loss_modules.items()}
        return {"optimizer": self.optimizer.state_dict(), "losses": losses}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Go on with the moments and counts of a used optimiser, and with the weights of losses.

        The optimiser's settings are the config's. Losses that ``tree`` does not hold begin anew.

        Raises:
            KeyError, ValueError, RuntimeError: it is of another network.
        """
        losses = tree.get("losses", {})
        for name in self.loss_modules.keys() & losses.keys():
            self.loss_modules[name].load_state_dict(losses[name])
        parameters = self.parameters()
        if list(losses) != list(self.loss_modules):  # the numbers of their parameters are others
            parameters = list(self.agent.parameters())
        state = {number: x for number, x in tree["optimizer"]["state"].items() if number < len(parameters)}
        if not state:
            raise ValueError("the optimiser has no state")
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": settings})
        for parameter in parameters:
            moments = self.optimizer.state.get(parameter)  # None: it begins anew
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq") if moments):
                raise ValueError("the optimiser's state is of another network")

    # --- one minibatch ---------------------------------------------------------------------------------------------

    def ppo_loss(self, env_steps: int) -> PPOLoss:
        """Build PPO's loss with the coefficients that hold after ``env_steps``."""
        clip_range = self.config.clip_range.at(env_steps, self.total_steps)
        entropy_coef = self.config.entropy_coef.at(env_steps, self.total_steps)
        nvec = self.agent.action_nvec
        return PPOLoss(config=self.config, action_nvec=nvec, clip_range=clip_range, entropy_coef=entropy_coef)

    def unroll(self, batch: Minibatch) -> tuple[Minibatch, AgentOutput]:
        """Unroll a minibatch with the current weights; return both without the steps that don't count."""
        batch = burnt_in(self.agent, batch)
        output = self.agent.unroll(
            batch.obs,
            self.agent.reset_state(batch.state, batch.start),  # a learnt initial state gets gradient here
            batch.sequences_per_step,
            self.encode,
            features=bool(self.auxiliary),
            in_loss=batch.in_loss,
            value_gradient_scale=self.config.value_gradient_scale,
        )
        return only_counted(batch), output

    def loss(self, batch: Minibatch, ppo: PPOLoss, moments: Moments | None = None) -> tuple[Float[Tensor, ""], Figures]:
        """Compute the sum of all losses of one minibatch with the current weights, and its figures.

        Args:
            batch: advantages as they are; they are normalised here, if the config says so.
            ppo: see :meth:`ppo_loss`.
            moments: of the advantages, where other ranks hold more of the minibatch.
        """
        batch, output = self.unroll(batch)
        if self.config.normalize_advantage:
            batch = replace(batch, advantage=normalize(batch.advantage, moments))
        return total_loss(batch, output, ppo, self.auxiliary)

    def backward(self, batch: Minibatch, ppo: PPOLoss, moments: Moments | None = None) -> Figures:
        """Add the gradients of :meth:`loss` to the parameters'; return its figures."""
        loss, figures = self.loss(batch, ppo, moments)
        with tf32(self.agent.precision, self.agent.device):
            loss.backward()
        return figures

    def _step(self, part: Part, minibatch: Callable[[Tensor], Minibatch], ppo: PPOLoss, timer: Timer) -> _Step:
        """Step the optimiser once, with the minibatch that ``minibatch`` makes of the part's sequences."""
        parameters = self.parameters()
        self.optimizer.zero_grad()
        figures: Figures = {}
        traces: list[Trace] = []
        if part.steps:
            with timer("sequences"):
                batch = minibatch(part.ids)
            with timer("learning"), self._traced() as traces:
                figures = self.backward(batch, ppo, part.moments)
        with timer("learning"):
            if self.config.jacobian_norm_coef:
                figures = self._add_jacobian_norm(traces, figures, part)
            figures = all_reduce_gradients(self.world, parameters, figures, part)
            norm = clip_gradients(parameters, self.config)
            figures = {**figures, "optim/grad_norm": norm}
            values = torch.stack(list(figures.values()))
            skipped = values.isfinite().logical_not().any()
            # Decided on the device, as the optimiser's fused kernels do for loss scaling.
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]
            self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        return _Step(part=part, tags=tuple(figures), figures=values, skipped=skipped)

    def _add_jacobian_norm(self, traces: Sequence[Trace], figures: Figures, part: Part) -> Figures:
        """Add :func:`jacobian_norm`'s mean over the pairs of all layers and ranks to the loss, after its backward pass.

        All ranks call it together. Returns the figures with ``loss/jacobian_norm``, and it in ``loss/total``.
        """
        coef, traces = self.config.jacobian_norm_coef, [trace for trace in traces if trace.steps is not None]
        terms = [jacobian_norm(trace) for trace in traces]
        count = torch.zeros((), dtype=torch.int64, device=self.agent.device)
        count = self.world.sum_(sum((pairs for _, pairs in terms), count))
        if not part.steps:
            return figures
        # Gradients and figures will be multiplied by steps / total_steps.
        mean = sum(term for term, _ in terms) / count.clamp(min=1) * (part.total_steps / part.steps)
        (coef * mean).backward(inputs=[x for trace in traces for x in trace.parameters])
        total = figures["loss/total"] + coef * mean.detach()
        return {**figures, "loss/total": total, "loss/jacobian_norm": mean.detach()}

    def cut(self, rollout: Rollout) -> Sequences:
        """Cut a rollout as the config says."""
        config = self.config
        return cut(rollout.start, config.sequence_length, config.sequence_stride, config.burn_in)

    # --- one iteration ---------------------------------------------------------------------------------------------

    def update(
        self,
        rollout: Rollout,
        targets: Targets,
        env_steps: int,
        timer: Timer,
        *,
        before_epoch: EpochHook | None = None,
        after_epoch: EpochHook | None = None,
    ) -> UpdateStats:
        """Train on one rollout; ``env_steps`` were done before it.

        With ``refresh_every`` set, ``rollout.state`` is computed anew between epochs, in place; all else stays.
        Waits for the device twice: for where episodes start, and at the end. With ``target_kl`` set the epochs stop
        early, after the first one whose mean ``approx_kl`` exceeds it; that costs one more wait per epoch.

        Raises:
            NonFiniteError: see the class.
        """
        config, ppo = self.config, self.ppo_loss(env_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate.at(env_steps, self.total_steps)
        for module in (self.agent, *self.loss_modules.values()):
            module.train()
        with timer("sequences"):
            sequences = self.cut(rollout)
        minibatch = partial(gather, rollout, targets, sequences)
        epochs: list[list[_Step]] = []
        for epoch in range(config.num_epochs):
            if epoch and config.refresh_every and epoch % config.refresh_every == 0:
                with timer("learning"):
                    rollout.state.rows.copy_(recomputed_states(self.agent, rollout).rows)
            if before_epoch is not None:
                before_epoch(epoch)
            with timer("sequences"):
                parts = self._partition(sequences, targets)
            epochs.append([self._step(part, minibatch, ppo, timer) for part in parts])
            if after_epoch is not None:
                after_epoch(epoch)
            if config.target_kl is not None:
                kl = _means(epochs[-1])[epochs[-1][0].tags.index("policy/approx_kl")]
                if float(kl) > config.target_kl:
                    break
        with timer("learning"):  # where a GPU catches up
            return self._report(epochs, sequences, cut_fraction(rollout.start, sequences), ppo, minibatch)

    def _partition(self, sequences: Sequences, targets: Targets) -> list[Part]:
        """Draw an epoch's minibatches."""
        config, world, counted = self.config, self.world, sequences.counted
        groups = split(counted, config.num_minibatches, self.generator, keep_empty=world.size > 1)
        parts = all_reduce_steps(world, groups, counted)
        if config.normalize_advantage and world.size > 1:
            parts = all_reduce_moments(world, targets.advantage, sequences, parts)
        return parts

    def _report(
        self,
        epochs: list[list[_Step]],
        sequences: Sequences,
        cut_share: Float[Tensor, ""],
        ppo: PPOLoss,
        minibatch: Callable[[Tensor], Minibatch],
    ) -> UpdateStats:
        """Wait for the device; gather the figures of all ranks.

        Raises:
            NonFiniteError: see the class.
        """
        steps = [step for epoch in epochs for step in epoch]
        tags = steps[0].tags
        flags = torch.stack([step.skipped for step in steps])
        *means, own_cut = torch.cat([_means(steps), flags, cut_share[None]]).tolist()
        skipped = [bool(flag) for flag in means[len(tags) :]]
        self._count_skipped(steps, skipped, minibatch)
        scalars = {} if all(skipped) else dict(zip(tags, means, strict=False))
        scalars |= {
            "optim/learning_rate": self.optimizer.param_groups[0]["lr"],
            "optim/entropy_coef": ppo.entropy_coef,
            "optim/clip_range": ppo.clip_range,
            "optim/updates": float(len(steps)),
            **self._sequence_figures(sequences, epochs, own_cut),
        }
        return UpdateStats(scalars=scalars, num_updates=len(steps), num_nonfinite=sum(skipped))

    def _sequence_figures(self, sequences: Sequences, epochs: list[list[_Step]], own_cut: float) -> dict[str, float]:
        """Compute ``sequences/*`` over all ranks; steps are those that sequences hold, whether or not they count."""
        padding = [padding_fraction(sequences, [x.part.ids for x in epoch if len(x.part.ids)]) for epoch in epochs]
        lengths, counted = sequences.lengths, int(sequences.counted.sum())
        own = [len(lengths), int(lengths.sum()), sum(padding) / len(padding), own_cut, sequences.computed, counted]
        sums = self.world.sum_(torch.tensor(own, dtype=torch.float64)).tolist()
        num_sequences, num_steps, padded, cut_steps, computed, counted = sums
        figures = {
            "sequences/count": num_sequences,
            "sequences/mean_length": num_steps / num_sequences,
            "sequences/padding_fraction": padded / self.world.size,
            "sequences/cut_fraction": cut_steps / self.world.size,
        }
        if sequences.in_loss is None and sequences.burn_in is None:
            return figures
        return {**figures, "sequences/computed_over_counted": computed / counted}

    def _count_skipped(self, steps: list[_Step], skipped: list[bool], minibatch: Callable[[Tensor], Minibatch]) -> None:
        for step, skip in zip(steps, skipped, strict=True):
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skip else 0
            if self._nonfinite_in_a_row >= self.max_nonfinite:
                text = f"loss or gradient was NaN or infinite in {self._nonfinite_in_a_row} updates in a row"
                last = minibatch(step.part.ids) if step.part.steps else None
                raise NonFiniteError(f"{text}; they were skipped", last)


def _means(steps: Sequence[_Step]) -> Float[Tensor, "_"]:
    """Average the figures of those that were not skipped over all their steps; NaN where none is left.

    Raises:
        ValueError: a loss reports other figures than before.
    """
    if len({step.tags for step in steps}) > 1:
        raise ValueError("losses must report the same figures for all minibatches")
    skipped = torch.stack([step.skipped for step in steps])
    weights = torch.tensor([float(step.part.total_steps) for step in steps])
    weight = to_device(weights, skipped.device).masked_fill(skipped, 0.0)
    figures = torch.stack([step.figures for step in steps]).masked_fill(skipped[:, None], 0.0)
    return (figures * weight[:, None]).sum(0) / weight.sum()
