"""The PPO loss (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7 and 9) on valid steps."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_tbptt.types import LossStats


def normalize(advantage: Float[Tensor, "M"], moments: tuple[Tensor, Tensor] | None = None) -> Float[Tensor, "M"]:
    """Zero mean and unit (population) variance over the valid steps; a single step becomes 0.

    ``moments``: mean and deviation, where these steps are only a part of the minibatch.
    """
    mean, deviation = moments or (advantage.mean(), advantage.std(correction=0))
    return (advantage - mean) / (deviation + 1e-8)


def ppo_loss(
    *,
    log_prob: Float[Tensor, "M A"],
    entropy: Float[Tensor, "M"],
    value: Float[Tensor, "M"],
    old_log_prob: Float[Tensor, "M A"],
    old_value: Float[Tensor, "M"],
    advantage: Float[Tensor, "M"],
    ret: Float[Tensor, "M"],
    clip_range: float,
    value_coef: float,
    entropy_coef: float,
    ratio: Literal["joint", "per_branch"],
    clip_value_loss: bool,
) -> LossStats:
    """Clipped policy loss + ``value_coef`` x (clipped) value loss - ``entropy_coef`` x entropy, means over M.

    ``ratio = "joint"``: one ratio of the whole action's probability. ``"per_branch"``: each branch of the action is
    clipped on its own and the mean over branches is taken, as in the published MemoryGym baselines. ``entropy`` is
    summed over branches by the caller. The value loss is the plain squared error, without a factor of 1/2; clipped,
    it is the larger of the errors with and without clipping the step away from ``old_value`` (as in Baselines' PPO2).

    ``loss`` of the result carries the gradient; the other fields are detached. ``approx_kl`` is the k3 estimator
    ``(r - 1) - log r`` (http://joschu.net/blog/kl-approx.html) of the joint ratio; ``clip_fraction`` is the share of
    ratios outside the clip range.
    """
    log_ratio = log_prob - old_log_prob
    joint_log_ratio = log_ratio.sum(-1)
    if ratio == "joint":
        log_ratio = joint_log_ratio[:, None]
    r = log_ratio.exp()
    adv = advantage[:, None]
    policy_loss = -torch.minimum(r * adv, r.clamp(1 - clip_range, 1 + clip_range) * adv).mean()

    error = (value - ret).square()
    if clip_value_loss:
        clipped = old_value + (value - old_value).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (clipped - ret).square())
    value_loss = error.mean()
    mean_entropy = entropy.mean()
    loss = policy_loss + value_coef * value_loss - entropy_coef * mean_entropy
    with torch.no_grad():
        approx_kl = (joint_log_ratio.exp() - 1 - joint_log_ratio).mean()
        clip_fraction = ((r - 1).abs() > clip_range).to(r.dtype).mean()
    return LossStats(
        loss=loss,
        policy_loss=policy_loss.detach(),
        value_loss=value_loss.detach(),
        entropy=mean_entropy.detach(),
        approx_kl=approx_kl,
        clip_fraction=clip_fraction,
    )
