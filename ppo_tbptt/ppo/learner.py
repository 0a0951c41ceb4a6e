"""The update: epochs over minibatches of whole sequences."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.ppo.all_reduce import Moments, share_gradients, share_moments, share_steps
from ppo_tbptt.ppo.losses import normalize, ppo_loss
from ppo_tbptt.ppo.sequences import cut, gather, padding_fraction, split
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.errors import RunError
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import LossStats, Minibatch, Obs, Rollout, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """Figures of one update, over all ranks. The loss figures are means over all steps of all minibatches."""

    loss: dict[str, float]
    """By field of :class:`~ppo_tbptt.types.LossStats`, and ``grad_norm`` (before clipping, mean over updates)."""
    learning_rate: float
    entropy_coef: float
    clip_range: float
    num_updates: int
    """Those that were skipped included."""
    num_nonfinite: int
    """Updates that were skipped because a figure of theirs, or their gradient, was NaN or infinite."""
    num_sequences: int
    mean_length: float
    padding_fraction: float


class NonFiniteError(RunError):
    """Too many updates in a row had a loss or gradient that was NaN or infinite; the weights are those before them.

    minibatch: the (last) one it happened with, None where this rank had no part in it.
    """

    def __init__(self, message: str, minibatch: Minibatch | None) -> None:
        super().__init__(message)
        self.minibatch = minibatch


class Learner:
    """Owns the optimiser and the order of the minibatches.

    ``generator`` (on the CPU) draws the permutations; ``total_steps`` is where schedules without a span of their own
    end. Each rank of ``world`` updates on its own rollout, and all step alike (see :mod:`ppo_tbptt.ppo.all_reduce`).

    An update whose loss or gradient is not finite is skipped: neither weights nor the optimiser's state change.
    ``max_nonfinite`` of them in a row, over the end of an iteration too, are the end.
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
    ) -> None:
        self.agent = agent
        self.config = config
        self.total_steps = total_steps
        self.generator = generator
        self.world = world or World()
        self.max_nonfinite = max_nonfinite
        self.encode: Callable[[Obs], Tensor] | None = None
        """The encoder where it is compiled."""
        self._nonfinite_in_a_row = 0
        self.optimizer = torch.optim.AdamW(
            agent.parameters(), lr=config.learning_rate.initial, weight_decay=config.weight_decay, fused=True
        )

    def load_optimizer(self, tree: dict[str, Any]) -> None:
        """Go on with the moments and counts of a used optimiser's ``state_dict``; its settings are the config's.

        Raises:
            KeyError, ValueError: it is of another network.
        """
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": tree["state"], "param_groups": settings})
        for parameter in self.agent.parameters():
            state = self.optimizer.state[parameter]
            if state["exp_avg"].shape != parameter.shape or state["exp_avg_sq"].shape != parameter.shape:
                raise ValueError("the optimiser's state is of another network")

    def loss(
        self, batch: Minibatch, *, clip_range: float, entropy_coef: float, moments: Moments | None = None
    ) -> LossStats:
        """The loss of one minibatch with the current weights.

        ``moments``: mean and deviation of the advantages, where other ranks hold more of the minibatch.
        """
        config = self.config
        logits, value = self.agent.unroll(batch.obs, batch.state, batch.batch_sizes, self.encode)
        log_prob, entropy = log_prob_and_entropy(logits, batch.action, self.agent.action_nvec)
        return ppo_loss(
            log_prob=log_prob,
            entropy=entropy,
            value=value,
            old_log_prob=batch.log_prob,
            old_value=batch.value,
            advantage=normalize(batch.advantage, moments) if config.normalize_advantage else batch.advantage,
            ret=batch.ret,
            clip_range=clip_range,
            value_coef=config.value_coef,
            entropy_coef=entropy_coef,
            ratio=config.ratio,
            clip_value_loss=config.clip_value_loss,
        )

    def update(
        self,
        rollout: Rollout,
        targets: Targets,
        env_steps: int,
        timer: Timer,
        *,
        before_epoch: Callable[[int], object] = lambda epoch: None,
        after_epoch: Callable[[int], object] = lambda epoch: None,
    ) -> UpdateStats:
        """Train on one rollout; ``env_steps`` were done before it.

        Waits for the device twice: for where episodes start, and at the end.

        With ``target_kl`` set the epochs stop early, after the first one whose mean ``approx_kl`` exceeds it; that
        costs one more wait per epoch.

        Raises:
            NonFiniteError: see the class.
        """
        config, world = self.config, self.world
        learning_rate = config.learning_rate.at(env_steps, self.total_steps)
        entropy_coef = config.entropy_coef.at(env_steps, self.total_steps)
        clip_range = config.clip_range.at(env_steps, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

        self.agent.train()
        with timer("sequences"):
            sequences = cut(rollout.start, config.sequence_length)
            lengths = sequences.lengths
        names = [f.name for f in fields(LossStats)]
        parameters = list(self.agent.parameters())
        sums: list[Tensor] = []  # [loss stats..., grad norm] x weight, one per update
        skipped: list[Tensor] = []
        weights: list[float] = []
        minibatches: list[Tensor] = []
        padding: list[float] = []
        for epoch in range(config.num_epochs):
            before_epoch(epoch)
            with timer("sequences"):
                groups = split(lengths, config.num_minibatches, self.generator, keep_empty=world.size > 1)
                padding.append(padding_fraction(sequences, [ids for ids in groups if len(ids)]))
                groups, own, steps = share_steps(world, groups, lengths)
                moments: list[Moments | None] = [None] * len(groups)
                if config.normalize_advantage and world.size > 1:
                    moments[:] = share_moments(world, targets.advantage, sequences, groups, steps)
            epoch_start = len(sums)
            for ids, m, total, moment in zip(groups, own, steps, moments, strict=True):
                self.optimizer.zero_grad(set_to_none=True)
                figures = parameters[0].new_zeros(len(names))
                if m:
                    with timer("sequences"):
                        batch = gather(rollout, targets, sequences, ids)
                    with timer("learning"):
                        stats = self.loss(batch, clip_range=clip_range, entropy_coef=entropy_coef, moments=moment)
                        stats.loss.backward()
                        figures = torch.stack([getattr(stats, name).detach() for name in names])
                with timer("learning"):
                    figures = share_gradients(world, parameters, figures, m / total)
                    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                    figures = torch.cat([figures, norm[None]])
                    skip = figures.isfinite().logical_not().any()
                    self._step_unless(skip)
                    sums.append(figures)
                    skipped.append(skip)
                    weights.append(float(total))
                    minibatches.append(ids)
            after_epoch(epoch)
            if config.target_kl is not None:
                means = _mean(sums[epoch_start:], weights[epoch_start:], skipped[epoch_start:])
                kl = means[names.index("approx_kl")]
                if float(kl) > config.target_kl:
                    break

        with timer("learning"):  # where a GPU catches up
            means = torch.cat([_mean(sums, weights, skipped), torch.stack(skipped)]).tolist()
        flags = [bool(flag) for flag in means[-len(skipped) :]]
        self._count(flags, lambda ids: gather(rollout, targets, sequences, ids) if len(ids) else None, minibatches)
        own = [len(lengths), int(lengths.sum()), sum(padding) / len(padding)]
        num_sequences, num_steps, padded = world.sum_(torch.tensor(own, dtype=torch.float64))
        return UpdateStats(
            loss=dict(zip([*names, "grad_norm"], means, strict=False)),
            learning_rate=learning_rate,
            entropy_coef=entropy_coef,
            clip_range=clip_range,
            num_updates=len(sums),
            num_nonfinite=sum(flags),
            num_sequences=int(num_sequences),
            mean_length=float(num_steps / num_sequences),
            padding_fraction=float(padded / world.size),
        )

    def _step_unless(self, skip: Bool[Tensor, ""]) -> None:
        """``optimizer.step()``, or nothing at all; decided on the device, as its fused kernels do for loss scaling."""
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def _count(self, skipped: list[bool], minibatch: Callable[[Tensor], Minibatch | None], ids: list[Tensor]) -> None:
        for update, skip in enumerate(skipped):
            self._nonfinite_in_a_row = self._nonfinite_in_a_row + 1 if skip else 0
            if self._nonfinite_in_a_row >= self.max_nonfinite:
                text = f"loss or gradient was NaN or infinite in {self._nonfinite_in_a_row} updates in a row"
                raise NonFiniteError(f"{text}; they were skipped", minibatch(ids[update]))


def _mean(rows: list[Tensor], weights: list[float], skipped: list[Tensor]) -> Tensor:
    """Of the rows that were not skipped; NaN where none is left."""
    out = torch.stack(skipped)
    weight = to_device(torch.tensor(weights), out.device).masked_fill(out, 0.0)
    return (torch.stack(rows).masked_fill(out[:, None], 0.0) * weight[:, None]).sum(0) / weight.sum()
