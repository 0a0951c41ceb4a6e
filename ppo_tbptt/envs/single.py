"""One environment with one interface, whatever its observation and action spaces are."""

import copy
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, SupportsInt

import gymnasium as gym
import numpy as np

from ppo_tbptt.envs import memory_gym
from ppo_tbptt.envs.interface import ArraySpec, EnvError, EnvSpec, Episode, Observation, WorkerError
from ppo_tbptt.envs.make import action_spec, check_options, observation_specs, open_env, try_options
from ppo_tbptt.envs.previous import PreviousInputs

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_NOT_FIGURES = frozenset({"reward", "length", "ground_truth", "episode", "TimeLimit.truncated"})


def make_env(
    env_id: str,
    *,
    options: Mapping[str, Any] | None = None,
    max_episode_steps: int | None = None,
    render_mode: str | None = None,
    previous: Sequence[str] = (),
) -> "SingleEnv":
    """Make one environment.

    Args:
        env_id: a MemoryGym id, `ppo_tbptt/...`, any id gymnasium knows, or `module:Id` to import `module` first.
        options: given to every reset; MemoryGym's reset parameters.
        max_episode_steps: truncate episodes after so many steps, in addition to the environment's own limits.
        render_mode: None, an own mode of the environment, or `"ground_truth"`: the picture with everything hidden
            from the agent for MemoryGym (336 x 336), `"rgb_array"` for others that offer it, else nothing.
        previous: `"previous_action"`, `"previous_reward"` or both to observe them too; see `PreviousInputs`.

    Raises:
        EnvError: no such environment or option, an option's value is refused, or a space is not supported.
    """
    if max_episode_steps is not None and max_episode_steps < 1:
        raise EnvError(f"{env_id}: max_episode_steps must be at least 1, not {max_episode_steps}")
    env = open_env(env_id, render_mode)
    if previous:
        env = PreviousInputs(env, previous)
    return SingleEnv(env, env_id, dict(options or {}), max_episode_steps)


class SingleEnv:
    """An environment that is reset with a level seed and acts on i64 arrays. See `make_env`.

    spec: its EnvSpec.
    """

    def __init__(
        self, env: gym.Env[Any, Any], env_id: str, options: dict[str, Any], max_episode_steps: int | None
    ) -> None:
        self._env, self._id, self._options, self._limit = env, env_id, options, max_episode_steps
        self._bare: Any = env.unwrapped
        self._task = memory_gym.TASKS.get(env_id.rpartition(":")[2])
        self.check_options({})
        nvec, discrete, self._first_action = action_spec(env.action_space, env_id)
        self._action_space = copy.deepcopy(env.action_space)
        headline, maximum = getattr(self._bare, "headline", ("return", None))
        if self._task:
            headline, maximum = self._task.headline, self._task.headline_max
        limits = [max_episode_steps, env.spec.max_episode_steps if env.spec else None]
        self.spec = EnvSpec(
            env_id=env_id,
            obs=observation_specs(env.observation_space, env_id),
            action_nvec=nvec,
            discrete=discrete,
            headline=headline,
            headline_max=maximum,
            max_episode_steps=min((limit for limit in limits if limit is not None), default=None),
        )
        self._renders = getattr(env, "render_mode", None) is not None
        self._shown: str | None = None
        self._seed = self._length = 0
        self._return = 0.0

    def reset(self, seed: SupportsInt, options: Mapping[str, Any] = MappingProxyType({})) -> Observation:
        """Begin an episode of the level `seed` and return its first observation (arrays of the caller's own).

        `options` replace those of `make_env` one by one, in this episode.

        Raises:
            WorkerError: the observation is not what its space says, or the action space has changed.
        """
        self._seed, self._length, self._return = int(seed), 0, 0.0
        options = {**self._options, **options}
        if self._task:
            memory_gym.before_reset(self._bare, options)
        obs, _ = self._env.reset(seed=self._seed, options=options or None)
        if self._env.action_space != self._action_space:
            change = f"from {self._action_space} to {self._env.action_space}"
            raise WorkerError(f"{self.where()}: the action space has changed {change}")
        if self._task:
            memory_gym.after_reset(self._bare)
            if self._renders:
                self._shown = memory_gym.shown_command(self._bare, first=True)
        return self._read(obs)

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, Episode | None]:
        """Take a step with `action`, i64 [A], each branch counting from 0.

        Returns observation (arrays of the caller's own), reward, terminated, truncated, and the episode if it ended.

        Raises:
            WorkerError: reward or observation are not finite, or the observation is not what its space says.
        """
        if self._renders and self._task:
            self._shown = memory_gym.shown_command(self._bare, first=False)
        choice = action + self._first_action  # a fresh array: Searing Spotlights keeps and later reads it
        obs, reward, terminated, truncated, info = self._env.step(int(choice[0]) if self.spec.discrete else choice)
        self._length += 1
        reward, terminated = float(reward), bool(terminated)
        if not abs(reward) <= _FLOAT32_MAX:  # nor is NaN
            raise WorkerError(f"{self.where()}: the reward is {reward}, not finite in float32")
        self._return += reward
        truncated = not terminated and (bool(truncated) or self._length == self._limit)
        episode = self._episode(terminated, info) if terminated or truncated else None
        return self._read(obs), reward, terminated, truncated, episode

    def render(self) -> np.ndarray | None:
        """Draw the present state, u8 [height, width, 3]; None without a render mode.

        MemoryGym's environments share the process's screen: except for ground truth, render before another one acts.
        """
        if not self._renders:
            return None
        frame: Any = memory_gym.render(self._bare, self._shown) if self._task else self._env.render()
        return np.array(frame) if isinstance(frame, np.ndarray) else None

    def close(self) -> None:
        """Free the environment. MemoryGym's own close would shut pygame down for all others of the process."""
        if not self._task:
            self._env.close()
        elif self._bare.debug_window is not None:
            self._bare.debug_window.destroy()
            self._bare.debug_window = None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check options of a `reset`, while no episode is under way.

        Raises:
            EnvError: an option does not exist, or its value is refused.
        """
        options = {**self._options, **options}
        check_options(self._id, self._env, options)
        if self._task:
            try_options(self._id, self._bare, options)

    def where(self) -> str:
        """Name the id, level seed and number of steps so far, for messages."""
        return f"{self.spec.env_id}, level seed {self._seed}, step {self._length}"

    def _read(self, obs: Any) -> Observation:
        values = obs if isinstance(obs, Mapping) else {"obs": obs}
        return {key: self._array(key, values[key], array) for key, array in self.spec.obs.items()}

    def _array(self, key: str, value: Any, expected: ArraySpec) -> np.ndarray:
        value = np.asarray(value)
        image = expected.dtype == "uint8"
        if value.shape != expected.shape or (image and value.dtype != np.uint8):
            found = f"{value.dtype} of shape {value.shape}"
            raise WorkerError(f"{self.where()}: observation {key!r} is {found}, its space says {expected}")
        if image:
            return value.copy()
        with np.errstate(over="ignore"):
            vector = value.astype(np.float32)
        if not np.isfinite(vector).all():
            raise WorkerError(f"{self.where()}: observation {key!r} is not finite in float32: {vector}")
        return vector

    def _episode(self, terminated: bool, info: Mapping[str, Any]) -> Episode:
        env = {key: float(value) for key, value in info.items() if key not in _NOT_FIGURES and _is_figure(value)}
        if self._task:
            measures = self._task.measure(self._bare, info if terminated else {})
        else:
            headline = self.spec.headline
            measures = {} if headline == "return" else {headline: env.get(headline, 0.0)}
            success = env.get("success", env.get("is_success", measures.get("success")))
            measures |= {} if success is None else {"success": success}
        return Episode(-1, self._seed, self._return, self._length, terminated, measures, env)


def _is_figure(value: Any) -> bool:
    """Whether `value` is one finite real number."""
    return isinstance(value, int | float | np.bool_ | np.integer | np.floating) and math.isfinite(value)
