"""Policy: a trained agent in a plain Gymnasium loop."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from configs_for_tests import tiny

import ppo_tbptt.envs.toy  # noqa: F401 (registers the toy tasks)
from ppo_tbptt import Policy
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.training.trainer import Trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "run"
    with Trainer(tiny(total_steps=64), path) as trainer:
        list(trainer)
    return path


def test_three_lines_on_a_plain_environment(run: Path) -> None:
    policy = Policy.load(run)
    env = gym.make("ppo_tbptt/PocMemory-v0", disable_env_checker=True)
    obs, _ = env.reset(seed=200_000)
    done = False
    while not done:
        action = policy.act(obs)
        assert isinstance(action, int)
        obs, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated


def test_it_carries_its_state_until_reset(run: Path) -> None:
    policy = Policy.load(run)
    obs = np.array([0.5, 0.0, -0.5], dtype=np.float32)
    values = []
    for _ in range(3):
        policy.act(obs)
        values.append(float(policy.value))  # type: ignore[arg-type]
    assert values[0] != values[1]
    policy.reset()
    policy.act(obs)
    assert float(policy.value) == values[0]  # type: ignore[arg-type]


def test_a_batch_equals_its_rows_and_resets_by_row(run: Path) -> None:
    policy, single = Policy.load(run), Policy.load(run)
    rng = np.random.default_rng(0)
    stream = rng.normal(size=(4, 3, 3)).astype(np.float32)  # steps, rows, features
    batch = []
    for t, obs in enumerate(stream):
        if t == 2:
            policy.reset(np.array([False, True, False]))
        batch.append(policy.act(obs, greedy=True))
        assert batch[-1].shape == (3,)
    for row in range(3):
        single.reset()
        actions = []
        for t, obs in enumerate(stream[:, row]):
            if t == 2 and row == 1:
                single.reset()
            actions.append(single.act(obs, greedy=True))
        assert actions == [int(step[row]) for step in batch]


def test_seeded_sampling_repeats(run: Path) -> None:
    policy = Policy.load(run)
    obs = np.zeros(3, dtype=np.float32)
    draws = []
    for seed in (1, 1, 2):
        policy.reset(seed=seed)
        draws.append([policy.act(obs) for _ in range(30)])
    assert draws[0] == draws[1] != draws[2]


def test_wrong_observations_are_named(run: Path) -> None:
    policy = Policy.load(run)
    with pytest.raises(ValueError, match=r"shape \(5,\); this agent was trained on \(3,\)"):
        policy.act(np.zeros(5))
    with pytest.raises(ValueError, match="trained on"):
        policy.act({"image": np.zeros(3)})
    policy.act(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="call reset"):
        policy.act(np.zeros(3))


def test_weights_that_do_not_belong_to_the_config(run: Path, tmp_path: Path) -> None:
    from ppo_tbptt.run.checkpoint import load_checkpoint, save_checkpoint

    tree = load_checkpoint(run / "checkpoints" / "iteration_0000001.pt")
    tree["config"]["core"]["hidden_size"] = 9
    save_checkpoint(tmp_path / "c.pt", {k: v for k, v in tree.items() if k != "format"})
    with pytest.raises(CheckpointError, match="don't belong together"):
        Policy.load(tmp_path / "c.pt")
