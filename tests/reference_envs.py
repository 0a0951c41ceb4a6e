"""Environments whose every observation, reward and ending follows from the level seed, the step and the action."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

VECTOR = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8)


class Vector(gym.Env[Any, Any]):
    """Episodes of 2 to 8 steps by level seed; every other group of seven levels ends in truncations.

    Rewards have no exact float32. The final ``info`` has a success, and on some levels a score.
    """

    headline = ("success", 1.0)
    observation_space: gym.spaces.Space[Any] = VECTOR
    action_space: gym.spaces.Space[Any] = gym.spaces.MultiDiscrete([3, 2])

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> Any:
        self.level, self.t = int(seed or 0), 0
        self.length, self.terminates = 2 + self.level % 7, self.level // 7 % 2 == 0
        return self.observe(), {}

    def observe(self) -> Any:
        return np.random.default_rng((self.level, self.t)).normal(size=5).astype(np.float32)

    def step(self, action: Any) -> Any:
        reward = 0.1 * (int(action[0]) - 1) * (1 - 2 * (self.level % 2)) + 0.3 * int(action[1]) * (self.t % 2)
        self.t += 1
        end = self.t == self.length
        return self.observe(), reward, end and self.terminates, end and not self.terminates, self.info(action, end)

    def info(self, action: Any, end: bool) -> dict[str, Any]:
        final = {"success": bool(action[1]), **({} if self.level % 3 else {"score": self.level / 10})}
        return {"t": self.t, **(final if end else {})}


class Image(Vector):
    observation_space = IMAGE

    def observe(self) -> Any:
        return self.frame()

    def frame(self) -> np.ndarray:
        return np.random.default_rng((self.level, self.t)).integers(0, 256, (36, 36, 3), np.uint8)


class Dict(Image):
    """Both of them."""

    observation_space = gym.spaces.Dict({"vector": VECTOR, "image": IMAGE})

    def observe(self) -> Any:
        return {"image": self.frame(), "vector": Vector.observe(self)}


for _kind in (Vector, Image, Dict):
    if f"reference/{_kind.__name__}-v0" not in gym.registry:
        gym.register(f"reference/{_kind.__name__}-v0", entry_point=f"reference_envs:{_kind.__name__}")
