"""Make the batch of environments that a config asks for. Apart from the rest, because workers read no config."""

from typing import Any

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs.levels import LevelSource
from ppo_tbptt.envs.workers.vector import VectorEnv

TWO_GROUPS_FROM = 256
"""Environments from which on two groups are the default on CUDA. With fewer a step of the environments takes less time
than acting for a half, which hardly depends on its size, so that acting twice costs more than it hides. By reckoning
with 16 cores, not measured."""


def make_vector_env(config: EnvConfig, levels: LevelSource, **changes: Any) -> VectorEnv:
    """Make the config's environments. `changes` are keyword arguments of :class:`VectorEnv` that differ from it."""
    names = ("num_envs", "num_workers", "options", "max_episode_steps", "step_timeout")
    arguments: dict[str, Any] = {name: getattr(config, name) for name in names}
    return VectorEnv(config.id, levels=levels, **{**arguments, **changes})


def double_buffered(config: EnvConfig, *, cuda: bool) -> bool:
    """Whether the config asks for two groups, one of which steps while the agent acts for the other."""
    auto = cuda and config.num_envs >= TWO_GROUPS_FROM
    return {"auto": auto, "on": True, "off": False}[config.double_buffering]
