"""An environment made of tensors behind the same interface: collected, trained, resumed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import collect, timeless, tiny_agent
from torch import Tensor

from ppo_tbptt.envs import BatchedEnv, EnvSpec, Episode, LevelSeeds, LevelSource, StepResult
from ppo_tbptt.envs.interface import ArraySpec
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.collector import RolloutCollector
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Carry

STEPS, ENVS, LENGTH = 12, 32, 3


class Recall(BatchedEnv):
    """The first observation shows a sign, and the third action must name it. Odd rows are truncated there."""

    spec = EnvSpec(
        env_id="recall",
        obs={"obs": ArraySpec(shape=(2,), dtype="float32")},
        action_nvec=(2,),
        discrete=True,
        headline="return",
        headline_max=1.0,
        max_episode_steps=None,
    )

    def __init__(self, levels: LevelSource) -> None:
        self.num_envs, self.groups, self.levels = ENVS, (slice(0, ENVS),), levels
        self.level, self.t = torch.zeros(ENVS, dtype=torch.int64), torch.zeros(ENVS, dtype=torch.int64)
        self.obs = self.observe()

    def observe(self) -> dict[str, Tensor]:
        cue = torch.where(self.t == 0, self.level % 2 * 2 - 1, 0)
        return {"obs": torch.stack([cue, self.t], 1).float()}

    def begin(self, rows: Tensor) -> None:
        for n in rows.nonzero().flatten().tolist():
            self.level[n], self.t[n] = self.levels.begin(n) or 0, 0
        self.obs = self.observe()

    def reset(self) -> dict[str, Tensor]:
        self.begin(torch.ones(ENVS, dtype=torch.bool))
        return self.observe()

    def send(self, action: Any, group: int = 0) -> None:
        assert isinstance(action, Tensor) and group == 0
        self.action = action[:, 0]

    def receive(self, group: int = 0) -> StepResult:
        self.t += 1
        end, odd = self.t == LENGTH, torch.arange(ENVS) % 2 == 1
        reward = (end & (self.action == self.level % 2)).float()
        final = self.observe()
        episodes = [
            Episode(n, int(self.level[n]), float(reward[n]), LENGTH, n % 2 == 0, {}, {})
            for n in end.nonzero().flatten().tolist()
        ]
        for episode in episodes:
            self.levels.ended(episode.index, episode)
        self.begin(end)
        return StepResult(reward=reward, terminated=end & ~odd, truncated=end & odd, final_obs=final, episodes=episodes)

    def state_dict(self) -> dict[str, Tensor]:
        return {"level": self.level.clone(), "t": self.t.clone()}

    def load_state_dict(
        self, state: Mapping[str, Any], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        self.level, self.t = state["level"].clone(), state["t"].clone()
        self.obs = self.observe()
        return np.ones(ENVS, np.bool_)

    def close(self) -> None:
        pass


def new_agent() -> Agent:
    return tiny_agent({"obs": (2,)}, (2,))


def test_a_rollout_of_tensors() -> None:
    agent = new_agent()
    collector = RolloutCollector(Recall(LevelSeeds(0, ENVS, 0, 100)), agent)
    carry = collector.begin()
    assert carry.start.all()
    result = collect(collector, carry, STEPS)
    rollout, even = result.rollout, torch.arange(ENVS) % 2 == 0
    assert torch.equal(rollout.obs["obs"][:, 0, 1], torch.arange(STEPS) % LENGTH * 1.0)
    assert (rollout.start == (torch.arange(STEPS) % LENGTH == 0)[:, None]).all()
    end = (torch.arange(STEPS) % LENGTH == LENGTH - 1)[:, None]
    assert torch.equal(rollout.terminated, end & even) and torch.equal(rollout.truncated, end & ~even)
    cue = rollout.obs["obs"][0, :, 0]
    answered = (rollout.action[LENGTH - 1, :, 0] * 2 - 1) == cue
    assert torch.equal(rollout.reward[LENGTH - 1], answered.float()) and rollout.reward[~end[:, 0]].sum() == 0
    final = torch.tensor([[0.0, LENGTH]]).expand(ENVS, 2)
    with torch.no_grad():
        state_in = agent.step({"obs": rollout.obs["obs"][LENGTH - 1]}, rollout.state[LENGTH - 1]).state_out
        bootstrap = agent.step({"obs": final}, state_in).value
    torch.testing.assert_close(rollout.next_value[LENGTH - 1], torch.where(even, 0.0, bootstrap))
    assert [episode.ret for episode in result.episodes[:ENVS]] == answered.float().tolist()
    assert not any(x.isnan().any() for x in (rollout.state.rows, rollout.value, rollout.reward, rollout.next_value))


def test_it_is_resumed_in_the_middle_of_its_episodes() -> None:
    agent, levels = new_agent(), LevelSeeds(0, ENVS, 0, 100)
    collector = RolloutCollector(Recall(levels), agent)
    carry = collect(collector, collector.begin(), STEPS).carry
    collector.envs.step(torch.zeros(ENVS, 1, dtype=torch.int64))
    saved, counts = collector.envs.state_dict(), levels.state_dict()
    carry = Carry(start=torch.zeros(ENVS, dtype=torch.bool), state=carry.state)
    expected = collect(collector, carry, STEPS, 1)
    levels = LevelSeeds(0, ENVS, 0, 100)
    levels.load_state_dict(counts)
    collector = RolloutCollector(Recall(levels), agent)
    again, exact = collector.resume(saved, carry.start, carry.state)
    assert exact.all()
    result = collect(collector, again, STEPS, 1)
    assert torch.equal(result.rollout.state.rows, expected.rollout.state.rows)
    for name in ("action", "next_value", "reward"):
        assert torch.equal(getattr(result.rollout, name), getattr(expected.rollout, name))


def test_a_training_in_it_is_resumed_exactly_with_it_alone(tmp_path: Path) -> None:
    config = tiny(total_steps=3 * 4 * ENVS, env={"num_envs": ENVS}, ppo={"rollout_steps": 4, "sequence_length": None})
    levels = LevelSeeds(0, ENVS, 0, 100)
    with Trainer(config, envs=Recall(LevelSeeds(0, ENVS, 0, 100))) as trainer:
        whole = [timeless(report.row()) for report in trainer]
    with Trainer(config, tmp_path / "run", envs=Recall(levels)) as trainer:
        next(trainer)
        assert trainer.levels is None and trainer.state_dict()["level_seeds"] == []
        assert trainer.save() is not None
    with pytest.raises(CheckpointError, match=r"run: its envs was handed in .*; resume with envs=\.\.\.$"):
        Trainer.resume(tmp_path / "run")
    with Trainer.resume(tmp_path / "run", envs=Recall(levels)) as trainer:
        assert trainer.notes == []
        assert [timeless(report.row()) for report in trainer] == whole[1:]


def test_a_trainer_takes_it() -> None:
    """Half of the answers are right without memory; 30 iterations are three times as many as it takes to learn."""
    ppo = {"num_epochs": 4, "learning_rate": 1e-2, "entropy_coef": 0.0, "gamma": 0.9, "sequence_length": None}
    ppo["rollout_steps"] = STEPS
    config = tiny(total_steps=30 * STEPS * ENVS, env={"num_envs": ENVS}, core={"hidden_size": 16}, ppo=ppo)
    with Trainer(config, envs=Recall(LevelSeeds(0, ENVS, 0, 100))) as trainer:
        right = [report.scalars["episode/return"] for report in trainer]
    assert right[0] < 0.7 < 0.95 < np.mean(right[-3:])
