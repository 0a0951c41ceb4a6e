"""Environments that write down what is done to them, and one whose success is dictated. For tests with no workers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import gymnasium as gym
import numpy as np
import reference_envs


class Step(NamedTuple):
    """What an environment was told, and what it said."""

    action: tuple[int, ...]
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass
class Played:
    """A reset of one environment, and the steps up to the next."""

    env: int
    """Number of the environment, in the order in which they were made."""
    seed: int
    options: dict[str, Any]
    steps: list[Step] = field(default_factory=list)


class Log:
    """Every reset of every environment that was made since :meth:`begin`, in order of time."""

    played: ClassVar[list[Played]] = []
    made: ClassVar[int] = 0

    @classmethod
    def begin(cls) -> None:
        cls.played, cls.made = [], 0

    @classmethod
    def take(cls) -> list[Played]:
        """What was written since `begin`; the next log begins."""
        played = cls.played
        cls.begin()
        return played


class Vector(reference_envs.Vector):
    """Ends by itself after 2 to ``longest`` steps, as its level seed alone decides.

    The info of a step before the last has another success than that of the last, or none. Besides, there are figures
    that only some levels have, and what is no figure at all.
    """

    def __init__(self) -> None:
        self.number = Log.made
        Log.made += 1

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Any:
        assert seed is not None and options is not None
        first = super().reset(seed=seed)
        self.length, self.terminates, self.moved = 2 + seed * 7919 % (options["longest"] - 1), seed % 2 == 0, 0
        self.now = Played(self.number, seed, dict(options))
        Log.played.append(self.now)
        return first

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.now.steps.append(Step((int(action[0]), int(action[1])), reward, terminated, truncated, info))
        return obs, reward, terminated, truncated, dict(info)

    def info(self, action: Any, end: bool) -> dict[str, Any]:
        self.moved += int(action[0])
        info: dict[str, Any] = {"moved": self.moved, "progress": self.t / self.length, "name": "no figure"}
        if end:
            info |= {"success": float(self.level % 5 < 2), "even": self.level % 2 == 0, "broken": float("inf")}
        elif self.level % 4 < 2:
            info["success"] = 0.5
        if self.level % 3 == 0:
            info["bonus"] = np.float32(self.level % 7)
        return info


class Unjudged(Vector):
    """The same without a headline, so that its success is a measure only where an episode reports it."""

    headline = ("return", None)


class Dictated(gym.Env[Any, Any]):
    """One step. ``script[i]`` is the success of all episodes of the i-th evaluation, and its return is opposite.

    Level seeds from ``held_out`` on are those of evaluations.
    """

    headline = ("success", 1.0)
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space: gym.spaces.Space[Any] = gym.spaces.Discrete(2)
    held_out = 1000
    episodes = 2
    """Of an evaluation."""
    script: ClassVar[list[float]] = []
    begun: ClassVar[int] = 0
    """Episodes of evaluations so far."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.success = 0.0
        if seed is not None and seed >= self.held_out:
            self.success = self.script[Dictated.begun // self.episodes]
            Dictated.begun += 1
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.ones(1, np.float32), 1 - self.success, True, False, {"success": self.success}


for _name in ("Vector", "Unjudged", "Dictated"):
    if f"recorded/{_name}-v0" not in gym.registry:
        gym.register(f"recorded/{_name}-v0", entry_point=f"recorded_envs:{_name}")
