"""Generalised advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 11 to 16)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_tbptt.types import Rollout, Targets

Moments = tuple[Float[Tensor, ""], Float[Tensor, ""]]
"""Mean and (population) standard deviation of a minibatch's advantages."""


def gae(
    reward: Float[Tensor, "T N"],
    value: Float[Tensor, "T N"],
    next_value: Float[Tensor, "T N"],
    end: Bool[Tensor, "T N"],
    *,
    gamma: float,
    gae_lambda: float,
) -> Float[Tensor, "T N"]:
    """Compute advantages ``A_t = delta_t + gamma * lambda * (1 - end_t) * A_{t+1}`` on the device of the inputs.

    ``next_value`` is the value of the true successor (0 after a terminal step, the bootstrap after a truncation),
    so ``delta_t = reward_t + gamma * next_value_t - value_t`` holds everywhere, and ``end`` (terminated or
    truncated) only stops the sum from running into the next episode.

    The recurrence is linear, so it is solved by doubling: after pass k each entry holds the sum over 2^k steps.
    That takes ceil(log2 T) vectorised passes instead of T small ones, which matters on a GPU.
    """
    advantage = reward + gamma * next_value - value
    decay = (gamma * gae_lambda) * (~end).to(advantage.dtype)
    steps = reward.shape[0]
    reach = 1
    while reach < steps:
        later_advantage = advantage[reach:]
        later_decay = decay[reach:]
        near, far = advantage[:-reach], advantage[-reach:]
        advantage = torch.cat((near + decay[:-reach] * later_advantage, far))
        decay = torch.cat((decay[:-reach] * later_decay, torch.zeros_like(decay[-reach:])))
        reach *= 2
    return advantage


def compute_targets(rollout: Rollout, *, gamma: float, gae_lambda: float) -> Targets:
    """Compute advantages, and value targets ``advantage + value`` (TD(lambda) returns)."""
    end = rollout.terminated | rollout.truncated
    advantage = gae(rollout.reward, rollout.value, rollout.next_value, end, gamma=gamma, gae_lambda=gae_lambda)
    return Targets(advantage=advantage, value_target=advantage + rollout.value)


def normalize(advantage: Float[Tensor, "M"], moments: Moments | None = None) -> Float[Tensor, "M"]:
    """Shift and scale to zero mean and unit (population) variance; a single step becomes 0.

    Args:
        advantage: of the steps of a minibatch that count.
        moments: those of the whole minibatch, where these steps are only a part of it.
    """
    mean, deviation = moments or (advantage.mean(), advantage.std(correction=0))
    return (advantage - mean) / (deviation + 1e-8)
