"""Loops around a Policy as the README shows them, on Gymnasium's own environments."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny

from ppo_tbptt import Policy
from ppo_tbptt.trainer import Trainer

# The README's block after the comment `<!-- tested: NAME -->`, or this where it has none.
ONE = """
import gymnasium as gym
import memory_gym  # registers its tasks

from ppo_tbptt import Policy

policy = Policy.load("runs/quickstart")
env = gym.make("MortarMayhem-Grid-v0", disable_env_checker=True)
obs, info = env.reset(seed=200_000, options=policy.config.env.options)
policy.reset(seed=0)  # at the start of every episode; a seed makes the sampled actions repeatable
done = False
while not done:
    obs, reward, terminated, truncated, info = env.step(policy.act(obs))  # greedy=True for the most probable action
    done = terminated or truncated
print(info)
"""
MANY = '''
import gymnasium as gym
import memory_gym  # registers its tasks
import numpy as np

from ppo_tbptt import Policy

policy = Policy.load("runs/quickstart")


class Task(gym.Wrapper):
    """Autoreset passes no options, so they are given here."""

    def reset(self, *, seed=None, options=None):
        return self.env.reset(seed=seed, options=policy.config.env.options)


def make():
    return Task(gym.make("MortarMayhem-Grid-v0", disable_env_checker=True))


# Since Gymnasium 1.0 environments reset one step late unless told otherwise; 0.29 knows nothing but the same step.
mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP} if hasattr(gym.vector, "AutoresetMode") else {}
envs = gym.vector.SyncVectorEnv([make] * 8, **mode)
obs, info = envs.reset(seed=200_000)
policy.reset(seed=0)
returns = np.zeros(8)
for _ in range(100):
    obs, reward, terminated, truncated, info = envs.step(policy.act(obs))
    policy.reset(terminated | truncated)  # obs is the next episode's first one there
    returns += reward
print(returns)
'''
README = Path(__file__).parent.parent / "README.md"


def block(name: str, otherwise: str) -> str:
    found = re.search(rf"<!-- tested: {name} -->\n+```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return found[1] if found else otherwise


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loops")
    config = tiny(
        total_steps=32,
        env={"id": "MortarMayhem-Grid-v0", "num_envs": 2, "options": {"command_count": [1]}},
        model={"cnn_channels": [4, 4, 4]},
    )
    with Trainer(config, path / "runs" / "quickstart") as trainer:
        list(trainer)
    return path


def execute(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    assert out.getvalue()
    return names


def test_one_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = execute(block("one environment", ONE), folder, monkeypatch)
    assert names["done"]
    assert names["info"]["length"] == 10  # of a single command: the options reached the environment


def test_a_vector_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten episodes of ten steps each: all environments have just begun anew, with options and without memory."""
    names = execute(block("a vector environment", MANY), folder, monkeypatch)
    assert names["terminated"].all()
    policy, fresh, obs = names["policy"], Policy.load(folder / "runs" / "quickstart"), names["obs"]
    policy.act(obs)
    fresh.act(obs)
    torch.testing.assert_close(policy.value, fresh.value, rtol=0, atol=0)
