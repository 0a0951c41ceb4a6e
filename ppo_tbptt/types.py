"""Value types that pass between the parts of one training iteration, and the one legend for their axes.

    T rollout steps   N environments   S sequences   L longest sequence   M steps of a minibatch, packed
    A action branches   K logits (sum of the branches' sizes)   D width of the recurrent state
    F features   P projected features   H core output   U distinct frames

    step t:  start_t, obs_t, state_t ──► action_t, log_prob_t, value_t ──► reward_t, terminated_t, truncated_t
             └──── input of t ─────┘     └───── policy at t ────┘          └─────── outcome of t ────────┘

``start_t`` is True iff ``obs_t`` is the first observation of an episode. ``state_t`` is what the core was *fed*
at t (already reset where ``start_t``). ``start_{t+1} == terminated_t | truncated_t``. Time is always the first axis.

Observations are always a dict of tensors, also where the environment has a single one (its key is ``"obs"``):
one shape of data, no case distinctions. Frames stay uint8 and channels-last.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Frames:
    """Images that repeat, each distinct one stored once."""

    table: UInt8[Tensor, "U X Y C"]
    number: Int[Tensor, "..."]
    """Which of the U frames each step shows."""

    def stacked(self) -> UInt8[Tensor, "... X Y C"]:
        """Return the frame of every step."""
        return self.table[self.number.to(self.table.device)]


@dataclass(frozen=True, slots=True)
class Projected:
    """What an agent makes, without memory, of the frames of a table (:meth:`ppo_tbptt.models.Agent.project`)."""

    values: Float[Tensor, "U P"]
    number: Int[Tensor, "N"]
    """Which frame each environment shows."""


Obs = dict[str, Any]
"""Observations by name: tensors ``[*batch, *shape]``, u8 for images and f32 for vectors; or :class:`Frames`."""


def per_step(x: Float[Tensor, "U F"], obs: Tensor | Frames) -> Float[Tensor, "M F"]:
    """Repeat what was computed of each distinct frame for every step that shows it; ``x`` itself of other ``obs``."""
    return x.index_select(0, obs.number) if isinstance(obs, Frames) else x


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """All that survives from one rollout to the next, beside the environments with their current observations."""

    start: Bool[Tensor, "N"]
    state: Float[Tensor, "N D"]
    """The core's state after the last step, not yet reset where ``start``."""


@dataclass(frozen=True, slots=True)
class States:
    """What the core was fed: at every step or, of cores with a wide state, only where a sequence can begin.

    That is where an episode or the rollout begins, and every ``spacing`` steps after either. ``states[t]`` and the like
    give the states of steps, NaN of those that are not kept.
    """

    rows: Float[Tensor, "K N D"]
    """K = T if all are kept. Else the first row holds the state at the start of an episode, the last one what is not
    kept, and those between are filled from top to bottom."""
    row: Int[Tensor, "T N"]
    """Which of the K rows each step's state is in."""
    spacing: int = 1
    """1: all are kept."""
    since: Int[Tensor, "N"] | None = None
    """Steps since the last beginning; only needed to :meth:`store` states where not all are kept."""
    filled: Int[Tensor, "N"] | None = None
    """The last one of the rows that are filled."""

    @classmethod
    def empty(cls, num_steps: int, num_envs: int, state_size: int, spacing: int, device: torch.device) -> "States":
        """Allocate rows of NaN; with a ``spacing`` of 1 all states are kept."""
        num_rows = num_steps if spacing == 1 else 3 + (num_steps - 1) // spacing
        rows = torch.full((num_rows, num_envs, state_size), torch.nan, device=device)
        if spacing == 1:
            return cls(rows, torch.arange(num_steps, device=device)[:, None].expand(-1, num_envs))
        row = torch.full((num_steps, num_envs), num_rows - 1, device=device)
        return cls(rows, row, spacing, *torch.zeros(2, num_envs, dtype=torch.int64, device=device))

    def store(self, t: int, envs: slice, state: Float[Tensor, "n D"], start: Bool[Tensor, "n"]) -> None:
        """Store what the core of these environments is fed at t, in the order of time; nothing waits for the device."""
        if self.since is not None and self.filled is not None:
            since, filled = self.since[envs], self.filled[envs]
            if t == 0:
                for count in (since, filled):
                    count.zero_()
            else:
                since.add_(1).masked_fill_(start, 0)
            kept = (since % self.spacing == 0) & ~start
            filled += kept
            self.row[t, envs] = torch.where(kept, filled, len(self.rows) - 1).masked_fill_(start, 0)
        self.write(t, envs, state)

    def write(self, t: int, envs: slice, state: Float[Tensor, "n D"]) -> None:
        """Replace the states of step t."""
        if self.spacing == 1:
            self.rows[t, envs] = state
        else:
            self.rows[self.row[t, envs], torch.arange(self.rows.shape[1], device=state.device)[envs]] = state

    def drop_unkept(self) -> None:
        """Overwrite with NaN what is not kept, when all steps are stored."""
        if self.spacing > 1:
            self.rows[-1] = torch.nan

    def at(self, step: Int[Tensor, "S"]) -> Float[Tensor, "S D"]:
        """Return the states of these steps, by their positions in the flattened ``[T * N]`` axes."""
        num_envs = self.rows.shape[1]
        row = step if self.spacing == 1 else self.row.flatten().index_select(0, step) * num_envs + step % num_envs
        return self.rows.flatten(0, 1).index_select(0, row)

    def kept(self) -> Float[Tensor, "*_ D"]:
        """Return the states of all steps at which they are kept."""
        if self.spacing == 1:
            return self.rows
        return self.at((self.row.flatten() < len(self.rows) - 1).nonzero().squeeze(1))

    def of_envs(self, envs: slice) -> "States":
        """Return those of some environments."""
        return States(self.rows[:, envs], self.row[:, envs], self.spacing)

    def __getitem__(self, at: Any) -> Tensor:
        """Index the states of all steps, ``[T, N, D]``."""
        num_envs = self.rows.shape[1]
        every = torch.arange(self.row.numel(), device=self.rows.device).view(-1, num_envs)[at]
        return self.at(every.flatten()).view(*every.shape, self.rows.shape[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """T steps of N environments; a :class:`~ppo_tbptt.ppo.collector.RolloutCollector` fills the tensors in place."""

    obs: Obs
    """Images as :class:`Frames`, whose numbers lie on the CPU."""
    start: Bool[Tensor, "T N"]
    state: States
    action: Int[Tensor, "T N A"]
    log_prob: Float[Tensor, "T N A"]
    """Per branch; the joint log-probability is the sum over the last axis."""
    value: Float[Tensor, "T N"]
    reward: Float[Tensor, "T N"]
    next_value: Float[Tensor, "T N"]
    """Value of t's true successor: 0 if terminated, V(final observation, state after t) if truncated.

    An episode whose environment failed in t is truncated too; its final observation is that of t.
    """
    terminated: Bool[Tensor, "T N"]
    truncated: Bool[Tensor, "T N"]

    @property
    def num_steps(self) -> int:
        """T."""
        return self.start.shape[0]

    @property
    def num_envs(self) -> int:
        """N."""
        return self.start.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the update aims at."""

    advantage: Float[Tensor, "T N"]
    value_target: Float[Tensor, "T N"]
    """Advantage + value: the lambda-return, towards which the value head is regressed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Where each sequence lies in a rollout; indices only, no copies of data. Lives on the CPU."""

    index: Int[Tensor, "L S"]
    """Into the rollout's flattened ``[T * N]`` axes; 0 where padded."""
    mask: Bool[Tensor, "L S"]
    """True on valid steps; padding only at the tail."""
    in_loss: Bool[Tensor, "L S"] | None = None
    """Valid steps that count in losses, figures and weights; None: all of them. No step counts in two sequences."""
    burn_in: "Sequences | None" = None
    """The steps right before each sequence, which warm its state without gradient: as many columns, some empty."""

    @property
    def lengths(self) -> Int[Tensor, "S"]:
        """Valid steps of each sequence."""
        return self.mask.sum(0)

    @property
    def counted(self) -> Int[Tensor, "S"]:
        """Steps of each sequence that count."""
        return self.lengths if self.in_loss is None else self.in_loss.sum(0)

    @property
    def computed(self) -> int:
        """Steps that the core is unrolled over, those of burn-in included."""
        return int(self.mask.sum()) + (0 if self.burn_in is None else self.burn_in.computed)


@dataclass(frozen=True, slots=True, kw_only=True)
class BurnIn:
    """The steps before some sequences of a minibatch, packed like those (see :class:`Minibatch`): B steps of R."""

    obs: Obs
    """``[B, *shape]``."""
    state: Float[Tensor, "R D"]
    """The stored state at each one's first step."""
    sequences_per_step: Int[Tensor, "_"]
    sequence: Int[Tensor, "R"]
    """Which of the minibatch's S sequences each one leads to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """Whole sequences, the longest first, packed: all their first steps, then all their second steps, and so on.

        sequences  aaaa       steps               a b c a b c a b a
                   bbb   ──►
                   cc         sequences_per_step  3     3     2   1

    No padding exists in it.
    """

    obs: Obs
    """``[M, *shape]``."""
    action: Int[Tensor, "M A"]
    log_prob: Float[Tensor, "M A"]
    value: Float[Tensor, "M"]
    advantage: Float[Tensor, "M"]
    value_target: Float[Tensor, "M"]
    state: Float[Tensor, "S D"]
    """What the core was fed at each sequence's first step."""
    start: Bool[Tensor, "S"]
    """Whether that step is the first of an episode."""
    sequences_per_step: Int[Tensor, "L"]
    """Number of sequences that have an l-th step; never increasing. Always on the CPU, as torch wants it."""
    in_loss: Int[Tensor, "C"] | None = None
    """Positions among the M of the C steps that count in the loss; None: all of them."""
    burn_in: BurnIn | None = None
    """What warms the states of sequences that have steps before them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutput:
    """What the network makes of M steps of S sequences; in a single step of N environments both M and S are N.

    Where some steps of the sequences don't count, M are those that do.
    """

    logits: Float[Tensor, "M K"]
    value: Float[Tensor, "M"]
    features: Float[Tensor, "M F"] | None
    """The encoder's, in the precision of the arithmetic; only where auxiliary losses may ask for them."""
    core_output: Float[Tensor, "M H"]
    """In the precision of the arithmetic."""
    state_out: Float[Tensor, "S D"]
    """The core's state after each sequence's last step."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a network gives out for losses of its own, ``[M, ...]`` each. The built-in agent: nothing."""
