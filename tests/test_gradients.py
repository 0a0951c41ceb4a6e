"""Backpropagation through time stops exactly where it should."""

from dataclasses import replace

import pytest
import torch
from helpers import NVEC, fake_rollout, fake_targets, naive_unroll, small_agent, warmed_up
from torch import Tensor

from ppo_tbptt.config import PPOConfig, Schedule
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo import learner as learner_module
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import PPOLoss
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Rollout

PPO = PPOLoss(config=PPOConfig(), action_nvec=NVEC, clip_range=0.2, entropy_coef=0.01)


def gradients(agent: Agent, loss: Tensor) -> list[Tensor]:
    return [g.clone() for g in torch.autograd.grad(loss, list(agent.parameters()))]


def loss_of_sequences(agent: Agent, rollout: Rollout, length: int | None) -> Tensor:
    sequences = cut(rollout.start, length)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    return PPO(batch, agent.unroll(batch.obs, batch.state, batch.sequences_per_step))[0]


def loss_of_naive_unroll(agent: Agent, rollout: Rollout, begins: Tensor) -> Tensor:
    return PPO(*naive_unroll(agent, rollout, begins))[0]


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


@pytest.mark.parametrize("core", ["rnn_tanh", "gru", "lstm", "ln_gru", "ln_lstm"])
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


@pytest.mark.parametrize("normalize", [False, True])
def test_steps_that_do_not_count_only_warm_the_state(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, gradients, moments, and the means over minibatches of a whole update at unchanged weights."""
    monkeypatch.setattr(learner_module, "cut", warmed_up)
    agent, start = small_agent("gru"), torch.rand(14, 3, generator=torch.Generator().manual_seed(1)) < 0.15
    rollout, targets = fake_rollout(agent, start), fake_targets(fake_rollout(agent, start))
    agent.train()
    sequences = warmed_up(start, 6)
    counts = torch.zeros(14 * 3, dtype=torch.bool)
    counts[sequences.index[2:][sequences.mask[2:]]] = True
    wanted, output = naive_unroll(agent, rollout, cuts(start, 6), counts.view(14, 3))
    if normalize:
        shifted = wanted.advantage - wanted.advantage.mean()
        wanted = replace(wanted, advantage=shifted / (shifted.square().mean().sqrt() + 1e-8))

    config = PPOConfig(
        learning_rate=Schedule(initial=0.0),
        normalize_advantage=normalize,
        sequence_length=6,
        num_minibatches=1 if normalize else 3,
    )
    learner = Learner(agent, config, total_steps=1000, generator=torch.Generator())
    batch = gather(rollout, targets, sequences, torch.arange(sequences.mask.shape[1]))
    total, _ = learner.loss(batch, learner.ppo_loss(0))
    expected, figures = learner.ppo_loss(0)(wanted, output)
    assert worst_relative(gradients(agent, total), gradients(agent, expected)) < 1e-4
    scalars = learner.update(rollout, targets, 0, Timer()).scalars
    assert {tag: scalars[tag] for tag in figures} == pytest.approx({k: float(x) for k, x in figures.items()}, abs=1e-5)
    assert scalars["loss/total"] == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_the_values_gradient_into_what_it_shares_with_the_policy_is_scaled(scale: float) -> None:
    """As if there were two losses: what is the value's own gets all of its gradient, everything else this share."""
    agent, start = small_agent("gru"), torch.rand(14, 3, generator=torch.Generator().manual_seed(1)) < 0.15
    rollout, sequences = fake_rollout(agent, start), cut(start, 4)
    config = PPOConfig(value_gradient_scale=scale, value_coef=0.7, clip_value_loss=False)
    learner = Learner(agent, config, total_steps=1000, generator=torch.Generator())
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    total, _ = learner.loss(batch, learner.ppo_loss(0))

    wanted, output = naive_unroll(agent, rollout, cuts(start, 4))
    policy, _ = replace(learner.ppo_loss(0), config=PPOConfig(value_coef=0.0))(wanted, output)
    value = 0.7 * (output.value - wanted.value_target).square().mean()
    assert total.item() == pytest.approx(policy.item() + value.item(), abs=1e-6)
    named = dict(agent.named_parameters())
    of_policy, of_value = (
        torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (policy, value)
    )
    scales = [1.0 if name.startswith("heads.value") else scale for name in named]
    expected = [a + s * b for a, s, b in zip(of_policy, scales, of_value, strict=True)]
    assert worst_relative(gradients(agent, total), expected) < 1e-4
    with torch.no_grad():
        packed = (batch.obs, batch.state, batch.sequences_per_step)
        scaled, plain = (agent.unroll(*packed, value_gradient_scale=s) for s in (scale, 1.0))
    assert torch.equal(scaled.value, plain.value)


def test_hooks_run_around_every_epoch_and_may_change_the_rollout() -> None:
    agent = small_agent("gru")
    rollout = fake_rollout(agent, torch.zeros(8, 2, dtype=torch.bool))
    learner = Learner(agent, PPOConfig(num_epochs=2, num_minibatches=1), total_steps=1000, generator=torch.Generator())
    calls: list[tuple[str, int]] = []

    def stale(epoch: int) -> None:
        calls.append(("before", epoch))
        rollout.log_prob.fill_(float("nan") if epoch else -1.0)

    stats = learner.update(
        rollout, fake_targets(rollout), 0, Timer(), before_epoch=stale, after_epoch=lambda k: calls.append(("after", k))
    )
    assert calls == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert (stats.num_updates, stats.num_nonfinite) == (2, 1)
