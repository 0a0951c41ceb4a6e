"""Backpropagation through time stops exactly where it should."""

import pytest
import torch
from helpers import fake_rollout, fake_targets, naive_unroll, small_agent
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.ppo.losses import ppo_loss
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.types import Rollout

CLIP = {"clip_range": 0.2, "value_coef": 0.5, "entropy_coef": 0.01, "ratio": "joint", "clip_value_loss": True}


def gradients(agent: Agent, loss: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(agent.parameters()))]


def loss_of_sequences(agent: Agent, rollout: Rollout, length: int | None) -> Tensor:
    sequences = cut(rollout.start, length)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    logits, value = agent.unroll(batch.obs, batch.state, batch.batch_sizes)
    log_prob, entropy = log_prob_and_entropy(logits, batch.action, agent.action_nvec)
    return ppo_loss(
        log_prob=log_prob,
        entropy=entropy,
        value=value,
        old_log_prob=batch.log_prob,
        old_value=batch.value,
        advantage=batch.advantage,
        ret=batch.ret,
        **CLIP,
    ).loss


def loss_of_naive_unroll(agent: Agent, rollout: Rollout, begins: Tensor) -> Tensor:
    log_prob, entropy, value = naive_unroll(agent, rollout, begins)
    targets = fake_targets(rollout)
    return ppo_loss(
        log_prob=log_prob.flatten(0, 1),
        entropy=entropy.flatten(),
        value=value.flatten(),
        old_log_prob=rollout.log_prob.flatten(0, 1),
        old_value=rollout.value.flatten(),
        advantage=targets.advantage.flatten(),
        ret=targets.ret.flatten(),
        **CLIP,
    ).loss


def cuts(start: Tensor, length: int | None) -> Tensor:
    """[T, N]: where sequences begin, counted by hand."""
    begins = torch.zeros_like(start)
    for n in range(start.shape[1]):
        since = 0
        for t in range(start.shape[0]):
            since = 0 if t == 0 or start[t, n] else since + 1
            begins[t, n] = since == 0 or (length is not None and since % length == 0)
    return begins


def worst_relative(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("core", ["rnn_tanh", "gru", "lstm"])
@pytest.mark.parametrize("length", [1, 3, 16, None])
def test_gradients_equal_the_naive_unroll(core: str, length: int | None) -> None:
    """With no length (or one that covers the rollout): of each whole episode; else with a detach at the cuts."""
    agent = small_agent(core, 2)
    start = torch.rand(14, 3, generator=torch.Generator().manual_seed(1)) < 0.15
    rollout = fake_rollout(agent, start)
    agent.train()
    ours = gradients(agent, loss_of_sequences(agent, rollout, length))
    naive = gradients(agent, loss_of_naive_unroll(agent, rollout, cuts(start, length)))
    assert worst_relative(ours, naive) < 1e-4  # float32 sums in another order
    if length is not None and length < 14:
        whole = gradients(agent, loss_of_naive_unroll(agent, rollout, cuts(start, None)))
        assert worst_relative(ours, whole) > 1e-3  # the cut is felt, so the comparison above says something


def test_a_value_depends_on_its_own_sequence_only() -> None:
    agent = small_agent()
    start = torch.zeros(8, 2, dtype=torch.bool)
    start[3, 0] = True
    rollout = fake_rollout(agent, start)
    sequences = cut(start, 4)  # env 0: steps 0-2, 3-6, 7; env 1: steps 0-3, 4-7
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    obs = batch.obs["obs"].requires_grad_()
    values = agent.unroll({"obs": obs}, batch.state, batch.batch_sizes)[1]
    column = torch.arange(len(batch.state))
    where = (column < batch.batch_sizes[:, None]).nonzero()  # [M, 2]: (step in sequence, sequence) of each valid step
    for m, (step, sequence) in enumerate(where.tolist()):
        (gradient,) = torch.autograd.grad(values[m], obs, retain_graph=True)
        touched = gradient.abs().sum(1) > 0
        expected = (where[:, 1] == sequence) & (where[:, 0] <= step)
        assert torch.equal(touched, expected)
