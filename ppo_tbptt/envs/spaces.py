"""Gymnasium spaces as specs: which observation and action spaces are supported, and their arrays."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ppo_tbptt.envs.interface import ArraySpec, EnvError

SUPPORTED_OBSERVATIONS = (
    "Box of uint8 and shape (height, width, channels), Box of numbers and shape (n,), or a Dict of such boxes"
)


def observation_specs(space: gym.Space[Any], env_id: str) -> dict[str, ArraySpec]:
    """Describe the arrays of an observation space.

    Raises:
        EnvError: `space` is neither a supported Box nor a Dict of them.
    """
    if isinstance(space, spaces.Dict):
        return {str(key): _box_spec(box, env_id, f"observation {key!r}") for key, box in space.spaces.items()}
    return {"obs": _box_spec(space, env_id, "the observation")}


def _box_spec(space: gym.Space[Any], env_id: str, name: str) -> ArraySpec:
    if isinstance(space, spaces.Box):
        shape = tuple(int(size) for size in space.shape)
        if len(shape) == 3 and space.dtype == np.uint8:
            return ArraySpec(shape=shape, dtype="uint8")
        if len(shape) == 1 and np.issubdtype(space.dtype, np.number):
            return ArraySpec(shape=shape, dtype="float32")
        found = f"a Box of {space.dtype} and shape {shape}"
    else:
        found = f"a {type(space).__name__}"
    raise EnvError(f"{env_id}: {name} is {found}; supported: {SUPPORTED_OBSERVATIONS}")


def action_spec(space: gym.Space[Any], env_id: str) -> tuple[tuple[int, ...], bool, np.ndarray]:
    """Describe an action space.

    Returns the number of choices per branch, whether a plain int is wanted, and the first choice per branch (i64 [A]).

    Raises:
        EnvError: `space` is neither Discrete nor a MultiDiscrete of rank one.
    """
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), True, np.array([space.start], np.int64)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)), np.int64)
        return tuple(int(n) for n in space.nvec), False, start
    found = f"{type(space).__name__} of shape {space.shape}"
    raise EnvError(f"{env_id}: the action space is {found}; supported: Discrete, or MultiDiscrete of rank one")
