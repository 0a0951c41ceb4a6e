"""Instruments: how gradients and states fare through time. They change nothing that a training depends on.

A figure is a mean or a ratio, returned as numerator and denominator (float64, on the CPU), so that those of several
ranks can be added before they are divided (:func:`quotient`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.advantages import normalize
from ppo_tbptt.ppo.losses import PPOLoss
from ppo_tbptt.ppo.sequences import cut, gather, only_counted
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.runtime.rng import preserved_globals
from ppo_tbptt.types import AgentOutput, Frames, Minibatch, Rollout, Targets

Ratio = Float[Tensor, "2"]
"""Numerator and denominator."""
Ratios = Float[Tensor, "_ 2"]

VANISHED = 0.01
"""Share of a gradient's norm under which it counts as vanished."""
SATURATED = 0.1
"""A gate is saturated within this distance of 0 or 1 (Karpathy et al. 2015, https://arxiv.org/abs/1506.02078)."""


def quotient(ratios: Float[Tensor, "*_ 2"]) -> Float[Tensor, "*_"]:
    """Divide numerators by denominators; 0 / 0 is NaN."""
    return ratios[..., 0] / ratios[..., 1]


def _ratio(numerator: Tensor | float, denominator: Tensor | float) -> Ratio:
    return torch.tensor([float(numerator), float(denominator)], dtype=torch.float64)


@contextmanager
def measuring(agent: Agent) -> Iterator[None]:
    """Switch dropout off; at the end restore the mode of each module, and the states of all global generators."""
    modes = {module: module.training for module in agent.modules()}
    agent.eval()
    try:
        # Without cuDNN, whose recurrent kernels have no backward pass in evaluation mode.
        with preserved_globals(agent.device), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def every_nth_env(rollout: Rollout, targets: Targets, n: int) -> tuple[Rollout, Targets]:
    """Take the environments 0, n, 2 n, ... of a rollout, with no frames but theirs."""

    def frames(x: Frames) -> Frames:
        number, inverse = x.number[:, ::n].unique(return_inverse=True)
        return Frames(x.table.index_select(0, number.to(x.table.device)), inverse)

    obs = {key: frames(x) if isinstance(x, Frames) else x[:, ::n] for key, x in rollout.obs.items()}
    others = [f.name for f in fields(Rollout) if f.name not in ("obs", "state")]
    own: dict[str, Any] = {name: getattr(rollout, name)[:, ::n] for name in others}
    advantage, value_target = targets.advantage[:, ::n], targets.value_target[:, ::n]
    own["state"] = rollout.state.of_envs(slice(None, None, n))
    return Rollout(obs=obs, **own), Targets(advantage=advantage, value_target=value_target)


# --- gradients -----------------------------------------------------------------------------------------------------


def unroll_by_step(
    agent: Agent, x: Float[Tensor, "M P"], batch: Minibatch
) -> tuple[Float[Tensor, "M H"], list[Float[Tensor, "_ D"]]]:
    """Unroll sequences in float32, one call of :meth:`.Core.forward` per step.

    Args:
        agent: in evaluation mode.
        x: the core's input (:meth:`~ppo_tbptt.models.Agent.core_input`), through which no gradient goes.
        batch: the sequences.

    Returns:
        The core's output, and what it was fed at each of the L steps by the sequences that have such a step.
    """
    sizes, state = batch.sequences_per_step.tolist(), batch.state.detach().requires_grad_()
    fed, outputs = [], []
    for inputs, going_on in zip(x.detach().split(sizes), [*sizes[1:], 0], strict=True):
        fed.append(state)
        y, after = agent.core(inputs[None], state)
        outputs.append(y[0])
        state = after[:going_on]
    return torch.cat(outputs), fed


def gradient_norms(
    agent: Agent, batch: Minibatch, y: Float[Tensor, "M H"], fed: list[Float[Tensor, "_ D"]], loss: PPOLoss
) -> Float[Tensor, "L S"]:
    """Compute ``||d loss_t / d state_{t-k}||`` for the last step t of each sequence.

    ``loss_t`` is PPO's loss of that step alone, ``state_{t-k}`` what the core was fed k steps before.

    Args:
        agent: whose heads make logits and values of ``y``.
        batch: advantages as they are; they are normalised over the batch, if the config says so.
        y: of :func:`unroll_by_step`, as ``fed``.
        fed: the states.
        loss: PPO's.

    Returns:
        Norms in float64 by k, then sequence, on the CPU; 0 where a sequence is no longer than k.
    """
    sizes = batch.sequences_per_step
    sequences = torch.arange(len(batch.state))
    lengths = (sizes[:, None] > sequences).sum(0)
    if loss.config.normalize_advantage:
        batch = replace(batch, advantage=normalize(batch.advantage))
    last = to_device((sizes.cumsum(0) - sizes)[lengths - 1] + sequences, y.device)
    batch = only_counted(replace(batch, in_loss=last))
    y = y.index_select(0, last)
    logits, value = agent.heads(y, loss.config.value_gradient_scale)
    mean, _ = loss(batch, AgentOutput(logits=logits, value=value, features=None, core_output=y, state_out=batch.state))
    gradients = torch.autograd.grad(mean * len(sequences), fed, allow_unused=True, materialize_grads=True)
    norms = torch.zeros(len(sizes), len(sequences), dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        own = sequences[: len(gradient)]
        norms[lengths[own] - 1 - step, own] = gradient.double().norm(dim=1).cpu()
    return norms


def decay(norms: Float[Tensor, "L S"], lengths: Tensor) -> Ratios:
    """Sum :func:`gradient_norms` over sequences, by k.

    The quotient is the mean norm at k in units of the mean norm at 0, both over the sequences longer than k: other
    sequences, which may have larger or smaller losses, do not bend the curve.
    """
    reach = lengths > torch.arange(len(norms))[:, None]  # [L, S]
    return torch.stack((norms.sum(1), (reach * norms[0]).sum(1)), 1)


def horizon(curve: Float[Tensor, "L"]) -> int:
    """Return the smallest k at which the quotient of :func:`decay` is under :data:`VANISHED`; else its length."""
    vanished = (curve < VANISHED).nonzero()
    return int(vanished[0]) if len(vanished) else len(curve)


# --- states --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def saturation(agent: Agent, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> Ratios:
    """Count the saturated gates of each layer at M steps, and all of them; see :data:`SATURATED`.

    A cell without gates has its units counted: of tanh those in the outer tenths of its range, of ReLU those that are
    off. No rows for a core that tells nothing (:meth:`.Core.gates`).
    """
    layers = [_ratio(((g < SATURATED) | (g > 1 - SATURATED)).sum(), g.numel()) for g in agent.core.gates(x, state)]
    return torch.stack(layers) if layers else torch.empty(0, 2, dtype=torch.float64)


@torch.no_grad()
def state_norm(state: Float[Tensor, "*_ D"]) -> Ratio:
    """Sum the norms of states, and count them."""
    return _ratio(state.double().norm(dim=-1).sum(), state[..., 0].numel())


@torch.no_grad()
def state_drift(stored: Float[Tensor, "*_ D"], recomputed: Float[Tensor, "*_ D"]) -> Ratio:
    """Sum ``||stored - recomputed||`` over states, and ``||recomputed||``: the distance in units of the norm."""
    return torch.stack((state_norm(stored - recomputed)[0], state_norm(recomputed)[0]))


@torch.no_grad()
def stale_kl(fresh: Float[Tensor, "M K"], stale: Float[Tensor, "M K"], nvec: tuple[int, ...]) -> Ratio:
    """Sum ``KL(fresh || stale)`` of the policies with these logits over M steps, in nats, and count the steps."""
    pairs = zip(fresh.double().split(nvec, 1), stale.double().split(nvec, 1), strict=True)
    logs = [(p.log_softmax(1), q.log_softmax(1)) for p, q in pairs]
    return _ratio(sum((p.exp() * (p - q)).sum() for p, q in logs), len(fresh))


# --- together ------------------------------------------------------------------------------------------------------


def measure(agent: Agent, rollout: Rollout, targets: Targets, loss: PPOLoss) -> dict[str, Ratios]:
    """Measure gradients and states of a rollout; call it inside of :func:`measuring`.

    The rollout is cut into sequences of ``sequence_length`` that follow one another, whatever their stride in training.

    Returns:
        ``gradient``, a row per k; ``saturation``, a row per layer; ``state_norm``, one row.
    """
    sequences = cut(rollout.start, loss.config.sequence_length)
    batch = gather(rollout, targets, sequences, torch.arange(len(sequences.lengths)))
    with torch.no_grad():
        x = agent.core_input(batch.obs)
    y, fed = unroll_by_step(agent, x, batch)
    norms = gradient_norms(agent, batch, y, fed, loss)
    return {
        "gradient": decay(norms, sequences.lengths.sort(descending=True).values),
        "saturation": saturation(agent, x, torch.cat(fed).detach()),
        "state_norm": state_norm(rollout.state.kept())[None],
    }


def scalars(measured: dict[str, Ratios]) -> dict[str, float]:
    """Return the figures of :func:`measure`, and of whatever else has one row, by tag; those that are not finite lack.

    Of ``NAME_epochN`` the last one is ``NAME`` too.
    """
    measured = dict(measured)
    curve, layers = quotient(measured.pop("gradient")), quotient(measured.pop("saturation")).tolist()
    figures = {name.partition("_epoch")[0]: float(quotient(row)) for name, row in measured.items()}
    figures |= {name: float(quotient(row)) for name, row in measured.items()}
    if curve[0] == 1:  # not 0 / 0
        figures["gradient_horizon"] = float(horizon(curve))
    if layers:
        figures["saturation"] = sum(layers) / len(layers)
    if len(layers) > 1:
        figures |= {f"saturation_l{layer}": share for layer, share in enumerate(layers)}
    return {f"memory/{name}": value for name, value in figures.items() if math.isfinite(value)}
