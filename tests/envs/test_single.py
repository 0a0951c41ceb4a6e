"""make_env for environments of any origin: spaces, limits, failures."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest

from ppo_tbptt.envs import ArraySpec, EnvError, EnvSpec, WorkerError, make_env

BOX = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)


class Adjustable(gym.Env[Any, Any]):
    """Says what it is told to."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, obs: Any, space: Any, actions: Any, info: Any = None, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space, self.render_mode = space, actions, render_mode
        self.obs, self.info, self.got = obs, info or {}, []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.got.append((seed, options))
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.got.append(action)
        return self.obs, np.float32(0.5), len(self.got) == 3, False, self.info  # pyright: ignore[reportReturnType]

    def render(self) -> Any:
        return np.full((4, 5, 3), len(self.got), np.uint8)


@pytest.fixture
def made() -> Iterator[Any]:
    """Register Adjustable with its arguments; a function that makes it."""
    name = "Adjustable-v0"

    def make(*arguments: Any, limit: int | None = None, **kwargs: Any) -> Any:
        names = ("obs", "space", "actions", "info")
        gym.registry.pop(name, None)
        given = dict(zip(names, arguments, strict=False))
        gym.register(name, f"{__name__}:Adjustable", max_episode_steps=limit, kwargs=given)
        return make_env(name, **kwargs)

    yield make
    gym.registry.pop(name, None)


@pytest.mark.parametrize(
    ("obs", "space", "expected"),
    [
        (np.zeros((6, 7, 4), np.uint8), gym.spaces.Box(0, 255, (6, 7, 4), np.uint8), {"obs": ((6, 7, 4), "uint8")}),
        (np.ones(2), gym.spaces.Box(-1, 1, (2,), np.float64), {"obs": ((2,), "float32")}),
        (np.ones(2, np.uint8), gym.spaces.Box(0, 9, (2,), np.uint8), {"obs": ((2,), "float32")}),
        (
            {"b": np.ones(2, np.int64), "a": np.zeros((3, 3, 1), np.uint8)},
            gym.spaces.Dict(b=gym.spaces.Box(-5, 5, (2,), np.int64), a=gym.spaces.Box(0, 255, (3, 3, 1), np.uint8)),
            {"a": ((3, 3, 1), "uint8"), "b": ((2,), "float32")},
        ),
    ],
)
def test_observations(made: Any, obs: Any, space: Any, expected: Any) -> None:
    env = made(obs, space, gym.spaces.Discrete(2))
    assert env.spec.obs == {key: ArraySpec(shape=shape, dtype=dtype) for key, (shape, dtype) in expected.items()}
    first = env.reset(5)
    for key, array in first.items():
        source = obs[key] if isinstance(obs, dict) else obs
        assert str(array.dtype) == expected[key][1] and np.array_equal(array, source)
        assert not np.shares_memory(array, source)
    again = EnvSpec.from_json(env.spec.to_json())
    assert again == env.spec and list(again.obs) == list(env.spec.obs)


ACTIONS = "supported: Discrete, or MultiDiscrete of rank one"


@pytest.mark.parametrize(
    ("space", "actions", "says"),
    [
        (gym.spaces.Discrete(3), gym.spaces.Discrete(2), "the observation is a Discrete; supported"),
        (gym.spaces.Box(0, 1, (6, 7, 3), np.float32), gym.spaces.Discrete(2), "float32 and shape"),
        (gym.spaces.Box(0, 255, (6, 7), np.uint8), gym.spaces.Discrete(2), r"shape \(6, 7\)"),
        (gym.spaces.Dict(x=gym.spaces.Dict(y=BOX)), gym.spaces.Discrete(2), "observation 'x' is a Dict"),
        (BOX, BOX, ACTIONS),
        (BOX, gym.spaces.MultiDiscrete(np.full((2, 2), 3)), ACTIONS),
    ],
)
def test_unsupported_spaces(made: Any, space: Any, actions: Any, says: str) -> None:
    with pytest.raises(EnvError, match=says):
        made(None, space, actions)


def test_actions_arrive_as_the_environment_wants_them(made: Any) -> None:
    env = made(np.zeros(2, np.float32), BOX, gym.spaces.Discrete(3, start=-1))
    assert (env.spec.action_nvec, env.spec.discrete) == ((3,), True)
    env.reset(9)
    env.step(np.array([2]))
    assert env._bare.got == [(9, None), 1] and type(env._bare.got[1]) is int
    env = made(np.zeros(2, np.float32), BOX, gym.spaces.MultiDiscrete([3, 2]), options={"anything": 1})
    assert (env.spec.action_nvec, env.spec.discrete) == ((3, 2), False)
    env.reset(9)
    env.step(np.array([2, 1]))
    assert env._bare.got[0] == (9, {"anything": 1}) and env._bare.got[1].tolist() == [2, 1]


def test_final_info(made: Any) -> None:
    info = {"is_success": True, "count": np.int32(3), "reward": 7.0, "episode": {"r": 1}, "array": np.ones(2)}
    info |= {"nan": np.nan, "text": "x", "TimeLimit.truncated": False, "length": 4, "ground_truth": 1.0}
    env = made(np.zeros(2, np.float32), BOX, gym.spaces.Discrete(2), info)
    env.reset(4)
    assert env.step(np.array([0]))[4] is None
    _, reward, terminated, truncated, episode = env.step(np.array([0]))
    assert (reward, type(reward), terminated, truncated) == (0.5, float, True, False)
    assert (episode.seed, episode.length, episode.ret, episode.terminated) == (4, 2, 1.0, True)
    assert episode.measures == {"success": 1.0} and episode.env == {"is_success": 1.0, "count": 3.0}
    assert (env.spec.headline, env.spec.headline_max) == ("return", None)


@pytest.mark.parametrize(("registered", "ours", "length"), [(1, None, 1), (None, 1, 1), (2, 1, 1), (1, 2, 1)])
def test_time_limits_truncate(made: Any, registered: int | None, ours: int | None, length: int) -> None:
    env = made(np.zeros(2, np.float32), BOX, gym.spaces.Discrete(2), limit=registered, max_episode_steps=ours)
    assert env.spec.max_episode_steps == length
    for _ in range(2):
        env._bare.got.clear()
        env.reset(0)
        *_, terminated, truncated, episode = env.step(np.array([0]))
        assert (terminated, truncated, episode.length, episode.terminated) == (False, True, 1, False)


def test_wrong_observation_is_an_error(made: Any) -> None:
    for wrong in (np.zeros(3, np.float32), np.array([0.0, np.inf]), np.array([0.0, 1e300])):
        env = made(wrong, BOX, gym.spaces.Discrete(2))
        with pytest.raises(WorkerError, match=r"Adjustable-v0, level seed 6, step 0: observation 'obs' is"):
            env.reset(6)
    env = made(np.zeros((4, 4, 3)), gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), gym.spaces.Discrete(2))
    with pytest.raises(WorkerError, match="float64 of shape"):
        env.reset(6)


def test_render_modes(made: Any) -> None:
    arguments = (np.zeros(2, np.float32), BOX, gym.spaces.Discrete(2))
    env = made(*arguments, render_mode="ground_truth")
    env.reset(0)
    assert (env.render() == 1).all() and env.render().shape == (4, 5, 3)
    assert made(*arguments).render() is None


def test_sigterm_still_ends_a_process_with_memory_gym_in_it() -> None:
    """SDL would turn the signal into an event that nobody reads."""
    code = (
        "import os, signal, time; from ppo_tbptt.envs import make_env\n"
        "make_env('MysteryPath-Grid-v0').reset(1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(20)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == -signal.SIGTERM
