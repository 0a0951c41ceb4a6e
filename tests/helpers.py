"""Small rollouts with and without environments, and a naive unroll to compare with."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from torch import Tensor

from ppo_tbptt.cli import main
from ppo_tbptt.config import Config, CoreConfig, ModelConfig
from ppo_tbptt.envs import LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent, Core
from ppo_tbptt.models.heads import log_prob_and_entropy, sample
from ppo_tbptt.ppo.collector import CollectedRollout, RolloutCollector, empty_rollout
from ppo_tbptt.ppo.learner import Learner, UpdateStats
from ppo_tbptt.ppo.losses import AuxiliaryLoss
from ppo_tbptt.ppo.refresh import burnt_in
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import AgentOutput, Carry, Minibatch, Rollout, Sequences, Targets

VECTOR = {"obs": (5,)}
NVEC = (3, 2)


def tiny_agent(
    obs_shapes: Mapping[str, tuple[int, ...]],
    action_nvec: tuple[int, ...],
    core: str = "gru",
    num_layers: int = 1,
    dropout: float = 0.0,
    seed: int = 0,
) -> Agent:
    """An agent of a few hundred weights, and its convolutions."""
    torch.manual_seed(seed)
    return Agent(
        obs_shapes,
        action_nvec,
        core=CoreConfig(kind=core, hidden_size=8, num_layers=num_layers, dropout=dropout),  # type: ignore[arg-type]
        model=ModelConfig(hidden_size=16, vector_hidden_sizes=(8,), cnn_channels=(4, 4, 4)),
    )


def small_agent(core: str = "gru", num_layers: int = 1, dropout: float = 0.0, seed: int = 0) -> Agent:
    """A vector agent in which a wrong state is visible."""
    agent = tiny_agent(VECTOR, NVEC, core, num_layers, dropout, seed)
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 2.0)  # far from uniform: the state matters
    return agent


def starts() -> Tensor:
    """Of 23 steps of 4 environments, [T, N]."""
    return torch.rand(23, 4, generator=torch.Generator().manual_seed(3)) < 0.15


@torch.no_grad()
def fake_rollout(
    agent: Agent, start: Tensor, *, seed: int = 0, store: str = "before", state_spacing: int = 1
) -> Rollout:
    """A rollout of ``agent`` over random observations with the given ``start`` pattern [T, N].

    The state before it is random, not zero. ``store = "after"`` is the mutant that stores each step's state too late.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, envs = start.shape
    obs = torch.randn(steps, envs, 5, generator=generator)
    rollout = empty_rollout(agent, steps, envs, state_spacing=state_spacing)
    agent.eval()
    rollout.obs["obs"].copy_(obs)
    rollout.start.copy_(start)
    state_out = torch.randn(envs, agent.core.state_size, generator=generator)
    for t in range(steps):
        state = agent.reset_state(state_out, start[t])
        output = agent.step({"obs": obs[t]}, state)
        state_out = output.state_out
        action, log_prob = sample(output.logits, torch.rand(envs, len(NVEC), generator=generator), NVEC)
        rollout.state.store(t, slice(0, envs), state if store == "before" else state_out, start[t])
        rollout.action[t], rollout.log_prob[t], rollout.value[t] = action, log_prob, output.value
    rollout.state.drop_unkept()
    return rollout


def fake_targets(rollout: Rollout, seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    advantage, error = (torch.randn(rollout.value.shape, generator=generator) for _ in range(2))
    device = rollout.value.device
    return Targets(advantage=advantage.to(device), value_target=rollout.value + error.to(device))


def update_once(learner: Learner) -> UpdateStats:
    """An update on the same steps each time."""
    rollout = fake_rollout(small_agent(), starts())
    return learner.update(rollout, fake_targets(rollout), 0, Timer())


def worst_replay(
    agent: Agent, rollout: Rollout, sequences: Sequences, ids: Tensor | None = None
) -> tuple[float, float]:
    """Largest |ratio - 1| of any branch, and largest difference of values, when the update recomputes a rollout."""
    agent.train()
    ids = torch.arange(sequences.mask.shape[1]) if ids is None else ids
    batch = burnt_in(agent, gather(rollout, fake_targets(rollout), sequences, ids))
    with torch.no_grad():
        output = agent.unroll(batch.obs, batch.state, batch.sequences_per_step)
        log_prob, _ = log_prob_and_entropy(output.logits, batch.action, agent.action_nvec)
    ratio, error = (log_prob - batch.log_prob).exp() - 1, output.value - batch.value
    return float(ratio.abs().max()), float(error.abs().max())


def run_core(core: Core, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [L, B, H] and state [B, D] after features [L, B, F]."""
    inputs = core.join_inputs([core.project_input(x.flatten(0, 1), slice(0, x.shape[2]))])
    return core(inputs.unflatten(0, x.shape[:2]), state)


def naive_unroll(
    agent: Agent, rollout: Rollout, begins: Tensor, counts: Tensor | None = None
) -> tuple[Minibatch, AgentOutput]:
    """Step by step through the rollout, one environment after the other, with :func:`fake_targets`.

    The state is reset at starts; gradients stop where ``begins`` [T, N] is True. Steps are left out where ``counts``
    [T, N] is False.
    """
    steps, envs = rollout.start.shape
    outputs, at = [], []
    for n in range(envs):
        state = rollout.state[0, n : n + 1]
        for t in range(steps):
            if begins[t, n]:
                state = state.detach()
            if rollout.start[t, n]:
                state = agent.core.initial_state(1)
            output = agent.step({"obs": rollout.obs["obs"][t, n : n + 1]}, state)
            state = output.state_out
            if counts is None or counts[t, n]:
                outputs.append(output)
                at.append((t, n))
    targets = fake_targets(rollout)

    def of(x: Tensor) -> Tensor:
        return torch.stack([x[t, n] for t, n in at])

    batch = Minibatch(
        obs={"obs": of(rollout.obs["obs"])},
        action=of(rollout.action),
        log_prob=of(rollout.log_prob),
        value=of(rollout.value),
        advantage=of(targets.advantage),
        value_target=of(targets.value_target),
        state=rollout.state[0],
        start=rollout.start[0],
        sequences_per_step=torch.tensor([0]),
    )
    names = [f.name for f in fields(AgentOutput) if f.name not in ("features", "extras")]
    rows: Any = {name: torch.cat([getattr(x, name) for x in outputs]) for name in names}
    return batch, AgentOutput(features=None, **rows)


def warmed_up(start: Tensor, length: int | None, *_: Any) -> Sequences:
    """Sequences whose first two steps only warm the state; some have no others."""
    sequences = cut(start, length)
    return replace(sequences, in_loss=sequences.mask & (torch.arange(len(sequences.mask))[:, None] >= 2))


def poison(when: Callable[[int], bool]) -> AuxiliaryLoss:
    """A loss that is 0, but NaN with NaN gradients at its k-th call where ``when(k)``; its figure is 1."""
    calls = itertools.count()

    def loss(batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
        return output.value.mean() * (torch.nan if when(next(calls)) else 0.0), {"poison/one": torch.ones(())}

    return AuxiliaryLoss(name="poison", coef=1.0, loss=loss)


def collect(collector: RolloutCollector, carry: Carry, steps: int, seed: int = 0) -> CollectedRollout:
    """A rollout of ``steps`` steps into new storage, with action noise of ``seed``."""
    agent, num_envs = collector.agent, collector.envs.num_envs
    generator = torch.Generator().manual_seed(seed)
    uniforms = torch.rand(steps, num_envs, len(agent.action_nvec), generator=generator)
    return collector.collect(carry, empty_rollout(agent, steps, num_envs), uniforms, Timer())


def tracers(num_envs: int, num_workers: int = 0, *, two_groups: bool = False) -> VectorEnv:
    """Tracers on the levels 10 to 59."""
    levels = LevelSeeds(7, num_envs, 10, 50)
    env_id = "fixture_envs:fixture/Tracer-v0"
    return VectorEnv(env_id, num_envs=num_envs, levels=levels, num_workers=num_workers, two_groups=two_groups)


def timeless(row: Mapping[str, float]) -> dict[str, float]:
    """What does not depend on the clock."""
    return {tag: value for tag, value in row.items() if not tag.startswith("time/")}


def train(config: Config, run: Path | None = None) -> list[dict[str, float]]:
    """The timeless rows of a whole training."""
    with Trainer(config, run) as trainer:
        return [timeless(report.row()) for report in trainer]


def train_tiny(path: Path, **changes: Any) -> Path:
    """A finished run of the tiny config with ``changes``."""
    train(tiny(**changes), path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command says about wrong input: one line, and exit code 2."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2, arguments
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.strip().isprintable(), error
    return error
