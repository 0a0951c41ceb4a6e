"""Value types that pass between the parts of one training iteration, and the one legend for their axes.

    T rollout steps   N environments   S sequences   L longest sequence   M valid steps of a minibatch
    A action branches   K logits (sum of the branches' sizes)   D width of the recurrent state

    step t:  start_t, obs_t, state_t ──► action_t, log_prob_t, value_t ──► reward_t, terminated_t, truncated_t
             └──── input of t ─────┘     └───── policy at t ────┘          └─────── outcome of t ────────┘

``start_t`` is True iff ``obs_t`` is the first observation of an episode. ``state_t`` is what the core was *fed*
at t (already reset where ``start_t``). ``start_{t+1} == terminated_t | truncated_t``. Time is always the first axis.

Observations are always a dict of tensors, also where the environment has a single one (its key is ``"obs"``):
one shape of data, no case distinctions. Frames stay uint8 and channels-last.
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

Obs = dict[str, Tensor]
"""Observations by name, each ``[*batch, *shape]``, u8 for images and f32 for vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """All that survives from one rollout to the next."""

    obs: Obs
    start: Bool[Tensor, "N"]
    state: Float[Tensor, "N D"]
    """The core's state after the last step, not yet reset where ``start``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """T steps of N environments: storage that a :class:`~ppo_tbptt.ppo.collector.RolloutCollector` fills in place."""

    obs: Obs
    start: Bool[Tensor, "T N"]
    state: Float[Tensor, "T N D"]
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
        return self.start.shape[0]

    @property
    def num_envs(self) -> int:
        return self.start.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the update aims at."""

    advantage: Float[Tensor, "T N"]
    ret: Float[Tensor, "T N"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Where each sequence lies in a rollout; indices only, no copies of data. Lives on the CPU."""

    index: Int[Tensor, "L S"]
    """Into the rollout's flattened ``[T * N]`` axes; 0 where padded."""
    mask: Bool[Tensor, "L S"]
    """True on valid steps; padding only at the tail."""

    @property
    def lengths(self) -> Int[Tensor, "S"]:
        return self.mask.sum(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """Whole sequences, the longest first, packed: all their first steps, then all their second steps, and so on.

        sequences  aaaa       steps        a b c a b c a b a
                   bbb   ──►
                   cc         batch_sizes  3     3     2   1

    No padding exists in it. ``state`` and ``start`` have a row per sequence.
    """

    obs: Obs
    action: Int[Tensor, "M A"]
    log_prob: Float[Tensor, "M A"]
    value: Float[Tensor, "M"]
    advantage: Float[Tensor, "M"]
    ret: Float[Tensor, "M"]
    state: Float[Tensor, "S D"]
    start: Bool[Tensor, "S"]
    """Whether the sequence begins an episode."""
    batch_sizes: Int[Tensor, "L"]
    """Number of sequences that have an l-th step; never increasing. Always on the CPU, as torch wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """Means over valid steps, as 0-d tensors that are still on the device."""

    loss: Float[Tensor, ""]
    policy_loss: Float[Tensor, ""]
    value_loss: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    approx_kl: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
