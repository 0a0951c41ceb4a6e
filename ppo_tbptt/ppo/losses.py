"""The loss: PPO's, and any auxiliary ones beside it.

A loss is a function, or an ``nn.Module``, of a minibatch and what the agent made of it. It sees nothing but steps that
count, hence needs no mask, and returns the mean over them with whatever figures it has to report, by their tags. A
module's parameters (a decoder's, say) are trained and saved with the agent's, and are no part of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ppo_tbptt.config import ConfigError, PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.models.plugins import load_plugin, one_line
from ppo_tbptt.ppo.reconstruction import Reconstruction
from ppo_tbptt.types import AgentOutput, Minibatch

Figures = dict[str, Float[Tensor, ""]]
"""Means over steps by their full tags (``policy/approx_kl``), detached and still on the device."""
Loss = Callable[[Minibatch, AgentOutput], tuple[Float[Tensor, ""], Figures]]
"""The mean loss over the steps of a minibatch, which carries the gradient, and its figures."""
LOSSES: dict[str, Callable[..., Any]] = {"reconstruction": Reconstruction}
"""Built-in auxiliary losses by the name in the config's ``[losses]``: functions, or classes built as ``(agent)``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOLoss:
    """PPO's loss (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7 and 9).

    Clipped policy loss + ``value_coef`` x (clipped) value loss - ``entropy_coef`` x entropy.

    ``ratio = "joint"``: one ratio of the whole action's probability. ``"per_branch"``: each branch of the action is
    clipped on its own and the mean over branches is taken, as in the published MemoryGym baselines. The entropy is
    summed over branches. The value loss is the plain squared error, without a factor of 1/2; clipped, it is the larger
    of the errors with and without clipping the step away from the rollout's value (as in Baselines' PPO2).

    ``policy/approx_kl`` is the k3 estimator ``(r - 1) - log r`` (http://joschu.net/blog/kl-approx.html) of the joint
    ratio; ``policy/clip_fraction`` is the share of ratios outside the clip range.
    """

    config: PPOConfig
    action_nvec: tuple[int, ...]
    clip_range: float
    entropy_coef: float

    def __call__(self, batch: Minibatch, output: AgentOutput) -> tuple[Float[Tensor, ""], Figures]:
        """Return the loss of a minibatch and its figures."""
        config, clip_range = self.config, self.clip_range
        log_prob, entropy = log_prob_and_entropy(output.logits, batch.action, self.action_nvec)
        log_ratio = log_prob - batch.log_prob
        joint_log_ratio = log_ratio.sum(-1)
        if config.ratio == "joint":
            log_ratio = joint_log_ratio[:, None]
        ratio = log_ratio.exp()
        advantage = batch.advantage[:, None]
        clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
        policy_loss = -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()

        error = (output.value - batch.value_target).square()
        if config.clip_value_loss:
            clipped_value = batch.value + (output.value - batch.value).clamp(-clip_range, clip_range)
            error = torch.maximum(error, (clipped_value - batch.value_target).square())
        value_loss = error.mean()
        mean_entropy = entropy.mean()
        loss = policy_loss + config.value_coef * value_loss - self.entropy_coef * mean_entropy
        with torch.no_grad():
            approx_kl = (joint_log_ratio.exp() - 1 - joint_log_ratio).mean()
            clip_fraction = ((ratio - 1).abs() > clip_range).to(ratio.dtype).mean()
        return loss, {
            "loss/policy": policy_loss.detach(),
            "loss/value": value_loss.detach(),
            "policy/entropy": mean_entropy.detach(),
            "policy/approx_kl": approx_kl,
            "policy/clip_fraction": clip_fraction,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryLoss:
    """A loss that is added to PPO's, ``coef`` times; logged without it, as ``loss/<name>``."""

    name: str
    coef: float
    loss: Loss


def total_loss(
    batch: Minibatch, output: AgentOutput, ppo: Loss, auxiliary: list[AuxiliaryLoss]
) -> tuple[Float[Tensor, ""], Figures]:
    """Add up all losses; the sum is the figure ``loss/total``."""
    total, figures = ppo(batch, output)
    for aux in auxiliary:
        loss, own = aux.loss(batch, output)
        total = total + aux.coef * loss
        figures = {**figures, f"loss/{aux.name}": loss.detach(), **own}
    return total, {"loss/total": total.detach(), **figures}


def build_losses(coefs: Mapping[str, float], agent: Agent) -> list[AuxiliaryLoss]:
    """Build the auxiliary losses of the config's ``[losses]``.

    Args:
        coefs: coefficients by name, of a built-in loss or ``module:name``; what stands after the colon is its tag.
        agent: what a loss that is a class is constructed with.

    Raises:
        ConfigError: no such loss, one that can't be built, or two of one name.
    """
    losses: dict[str, AuxiliaryLoss] = {}
    for name, coef in coefs.items():
        tag = name.rpartition(":")[2]
        if tag in losses or tag in ("total", "policy", "value"):
            raise ConfigError(f"losses: {name!r}: there is a loss of the name {tag!r} already")
        losses[tag] = AuxiliaryLoss(name=tag, coef=coef, loss=_build_loss(name, agent))
    return list(losses.values())


def _build_loss(name: str, agent: Agent) -> Any:
    loss = LOSSES.get(name) or load_plugin("losses", name, LOSSES)
    if isinstance(loss, type):
        try:
            loss = loss(agent)
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            raise ConfigError(f"losses: {name!r}: {one_line(error)}") from error
    if not callable(loss):
        raise ConfigError(f"losses: {name!r}: {type(loss).__name__} can't be called as (batch, output)")
    return loss.to(agent.device) if isinstance(loss, nn.Module) else loss
