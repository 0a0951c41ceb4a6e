"""BPTT(k1, k2) with burn-in: losses and gradients of an update are those of a naive loop.

Those of two ranks, and whole trainings with it, are in `test_reference_training.py`.
"""

from collections.abc import Iterator

import pytest
import torch
from helpers import NVEC, fake_rollout, fake_targets, small_agent, tiny_agent
from test_frames import SHAPES, some_rollout
from torch import Tensor

from ppo_tbptt.config import PPOConfig, Schedule
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import AuxiliaryLoss
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import AgentOutput, Frames, Minibatch, Rollout, Targets

CASES = [(1, 1, 0), (1, 8, 0), (4, 8, 0), (8, 8, 0), (8, None, 0), (2, 5, 3), (6, 6, 9)]
"""k1, k2 and burn-in."""


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rollout_and_targets(rank: int) -> tuple[Rollout, Targets]:
    start = torch.zeros(19, 2, dtype=torch.bool)
    start[[[3, 14], [5, 6]][rank], [0, 1]] = True
    rollout = fake_rollout(small_agent("lstm", 2), start, seed=rank)
    return rollout, fake_targets(rollout, seed=10 + rank)


def changed_agent() -> Agent:
    """The agent of the rollouts after a few updates, so to say: their states are stale."""
    agent = small_agent("lstm", 2)
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return agent


def config(stride: int, length: int | None, burn_in: int) -> PPOConfig:
    """An epoch of one minibatch that changes no weights and clips no gradient."""
    return PPOConfig(
        sequence_length=length,
        sequence_stride=stride,
        burn_in=burn_in,
        num_epochs=1,
        num_minibatches=1,
        learning_rate=Schedule(initial=0.0),
        entropy_coef=Schedule(initial=0.1),
        clip_value_loss=False,
        normalize_advantage=True,
        max_grad_norm=1e9,
    )


def update(world: World, case: tuple[int, int | None, int]) -> dict[str, Tensor]:
    agent = changed_agent()
    learner = Learner(agent, config(*case), total_steps=1, generator=torch.Generator(), world=world)
    scalars = learner.update(*rollout_and_targets(world.rank), 0, Timer()).scalars
    gradient = torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])
    figures = {tag: torch.tensor(scalars[tag]) for tag in ("loss/total", "policy/entropy", "policy/approx_kl")}
    return {"gradient": gradient, **figures, "counts": torch.tensor(scalars["sequences/count"])}


def naive_update(ranks: list[int], stride: int, length: int | None, burn_in: int) -> dict[str, Tensor]:
    """One environment, piece of episode, sequence and step after the other."""
    agent, rows, num_sequences = changed_agent(), [], 0
    for rollout, targets in map(rollout_and_targets, ranks):
        for n in range(rollout.num_envs):
            begins = [t for t in range(rollout.num_steps) if t == 0 or rollout.start[t, n]]
            for begin, end in zip(begins, [*begins[1:], rollout.num_steps], strict=True):
                for done in range(begin, end, stride):
                    first = begin if length is None else max(begin, done + stride - length)
                    warm = max(begin, first - burn_in)
                    state, num_sequences = rollout.state[warm, n][None], num_sequences + 1
                    for t in range(warm, min(done + stride, end)):
                        output = agent.step({"obs": rollout.obs["obs"][t, n][None]}, state)
                        state = output.state_out.detach() if t < first else output.state_out
                        if t >= done:
                            log_prob, entropy = log_prob_and_entropy(output.logits, rollout.action[t, n][None], NVEC)
                            log_ratio = (log_prob - rollout.log_prob[t, n]).sum()
                            error = (output.value - targets.value_target[t, n]) ** 2
                            rows.append((log_ratio, error[0], entropy[0], targets.advantage[t, n]))
    log_ratio, error, entropy, advantage = map(torch.stack, zip(*rows, strict=True))
    advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
    ratio = log_ratio.exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
    loss = (policy + 0.5 * error - 0.1 * entropy).mean()
    return {
        "gradient": torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]),
        "loss/total": loss.detach(),
        "policy/entropy": entropy.mean().detach(),
        "policy/approx_kl": (ratio - 1 - log_ratio).mean().detach(),
        "counts": torch.tensor(float(num_sequences)),
    }


def test_an_update_is_that_of_a_naive_loop() -> None:
    gradients: list[Tensor] = []
    for case in CASES:
        wanted = naive_update([0], *case)
        torch.testing.assert_close(update(World(), case), wanted, rtol=0, atol=1e-10, msg=lambda m, c=case: f"{c}: {m}")
        # The reach of gradients, and burn-in, are felt, so that the comparison says something.
        assert all((wanted["gradient"] - other).abs().max() > 1e-4 for other in gradients), case
        gradients.append(wanted["gradient"])


def test_losses_see_the_steps_that_count_alone_and_overlaps_encode_a_frame_once() -> None:
    agent, seen = tiny_agent(SHAPES, (3, 2)), []

    def spy(batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((batch, output))
        return output.value.sum(), {}

    auxiliary = [AuxiliaryLoss(name="spy", coef=1.0, loss=spy)]
    learner = Learner(agent, PPOConfig(), total_steps=1, generator=torch.Generator(), auxiliary=auxiliary)
    rollout = some_rollout(agent, 200)  # in which no frame repeats
    sequences = cut(rollout.start, 4, 2)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(len(sequences.counted)))
    image, at = batch.obs["image"], batch.in_loss
    assert isinstance(image, Frames) and at is not None and len(at) == rollout.value.numel() < len(batch.value)
    assert len(image.table) == len(image.number.unique()) <= rollout.value.numel()

    learner.loss(batch, learner.ppo_loss(0))
    state = agent.reset_state(batch.state, batch.start)
    output = agent.unroll(batch.obs, state, batch.sequences_per_step)
    counted_batch, counted = seen[0]
    for name in ("logits", "value", "features", "core_output"):
        torch.testing.assert_close(getattr(counted, name), getattr(output, name)[at])
    for name in ("action", "log_prob", "value", "advantage", "value_target"):
        assert torch.equal(getattr(counted_batch, name), getattr(batch, name)[at])
    assert torch.equal(counted_batch.obs["image"].stacked(), image.stacked()[at])
    assert torch.equal(counted_batch.obs["vector"], batch.obs["vector"][at])
