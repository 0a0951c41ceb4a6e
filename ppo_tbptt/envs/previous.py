"""The previous action and the previous reward as observations, for agents that are to know what they did and got."""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from ppo_tbptt.envs.interface import EnvError
from ppo_tbptt.envs.make import action_spec

PREVIOUS = ("previous_action", "previous_reward")
"""The observations that `PreviousInputs` can add."""


class PreviousInputs(gym.Wrapper[Any, Any, Any, Any]):
    """Adds what happened before to each observation, after the environment's own; a Box becomes `"obs"` in a Dict.

    previous_action: f32 [sum of the branches' choices], the last action one-hot, branch beside branch.
    previous_reward: f32 [1], the last reward.

    Both are zero in an episode's first observation. The last observation of an episode has those that led to it.
    """

    def __init__(self, env: gym.Env[Any, Any], names: Sequence[str] = PREVIOUS) -> None:
        """Wrap `env`; `names` are those of `PREVIOUS` to add.

        Raises:
            EnvError: the environment has such an observation already, or its action space is not supported.
        """
        super().__init__(env)
        env_id = env.spec.id if env.spec else type(env.unwrapped).__name__
        nvec, _, first = action_spec(env.action_space, env_id)
        self._names, self._num_choices = tuple(names), sum(nvec)
        self._shift = np.cumsum([0, *nvec[:-1]]) - first  # from the number of a choice to its place in the one-hot
        own = env.observation_space
        boxes = dict(own.spaces) if isinstance(own, gym.spaces.Dict) else {"obs": own}
        for name in names:
            if name in boxes:
                raise EnvError(f"{env_id}: has an observation {name!r} of its own; model.{name} must be false")
            size = self._num_choices if name == "previous_action" else 1
            boxes[name] = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.observation_space = gym.spaces.Dict(list(boxes.items()))  # of a list the order is kept

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Reset the environment."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._with(obs, np.zeros(self._num_choices, np.float32), 0.0), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment."""
        one_hot = np.zeros(self._num_choices, np.float32)
        one_hot[np.atleast_1d(action) + self._shift] = 1.0
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._with(obs, one_hot, reward), reward, terminated, truncated, info

    def _with(self, obs: Any, one_hot: np.ndarray, reward: Any) -> dict[str, Any]:
        previous = {"previous_action": one_hot, "previous_reward": np.array([reward], np.float32)}
        own = obs if isinstance(obs, Mapping) else {"obs": obs}
        return {**own, **{name: previous[name] for name in self._names}}
