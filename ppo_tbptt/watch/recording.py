"""Recordings of episodes: observations, the agent's outputs and its recurrent state at every step."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ppo_tbptt.envs import EnvSpec, Episode, SingleEnv
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.watch.environment import Env

_Compressed = Callable[[], np.ndarray]
"""Restores an array: frames compress well, and a long episode has thousands of them."""


def _compress(array: np.ndarray) -> _Compressed:
    data, dtype, shape = zlib.compress(array.tobytes(), 1), array.dtype, array.shape
    return lambda: np.frombuffer(zlib.decompress(data), dtype).reshape(shape)


@dataclass(slots=True, kw_only=True, eq=False)
class Recording:
    """One episode, or the part of it that was played so far.

    ``probs``, ``actions``, ``values`` and ``states`` have one entry for each observation that the agent acted on: all
    but the final observation of a terminated or truncated episode.
    """

    spec: EnvSpec
    seed: int
    greedy: bool
    probs: list[list[np.ndarray]] = field(default_factory=list)
    """By step, then action branch: the probability of each choice, f32 ``[K]``."""
    actions: list[np.ndarray] = field(default_factory=list)
    """i64 ``[A]`` each."""
    values: list[float] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    """The recurrent state after each observation, f32 ``[D]``."""
    rewards: list[float] = field(default_factory=list)
    """``rewards[t]`` follows ``actions[t]``."""
    episode: Episode | None = None
    """None until the environment ends the episode."""
    capped: bool = False
    """Whether it was stopped at the limit on steps, though the episode had not ended."""
    _views: list[tuple[dict[str, _Compressed], _Compressed | None]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Steps played so far."""
        return len(self.rewards)

    @property
    def over(self) -> bool:
        """Whether no more steps will follow."""
        return self.capped or self.episode is not None

    def obs(self, index: int) -> dict[str, np.ndarray]:
        """Return the observation after ``index`` steps."""
        return {key: restore() for key, restore in self._views[index][0].items()}

    def rendered(self, index: int) -> np.ndarray | None:
        """Return the environment's rendering after ``index`` steps, u8 ``[height, width, 3]``, or None without one."""
        restore = self._views[index][1]
        return None if restore is None else restore()

    def add(self, policy: Policy, env: Env, obs: dict[str, np.ndarray]) -> None:
        """Append the observation and rendering after the last step and, unless the episode has ended, an action."""
        picture = env.render()
        views = {key: _compress(array) for key, array in obs.items()}
        self._views.append((views, None if picture is None else _compress(picture)))
        if self.episode is None:
            self.actions.append(np.atleast_1d(np.asarray(policy.act(obs, greedy=self.greedy), dtype=np.int64)))
            self.probs.append(policy.probs)
            self.values.append(float(policy.value))  # type: ignore[arg-type]
            self.states.append(policy.state)


def begin_episode(policy: Policy, env: Env, seed: int, *, greedy: bool = False) -> Recording:
    """Reset to level ``seed`` and choose the first action. The same seed samples the same actions.

    Raises:
        EnvError: the environment does not fit the agent.
    """
    if isinstance(env, SingleEnv):
        check_fits(policy.agent, env.spec)
    policy.reset(seed=seed)
    recording = Recording(spec=policy.spec, seed=seed, greedy=greedy)
    recording.add(policy, env, env.reset(seed))
    return recording


def step_episode(policy: Policy, env: Env, recording: Recording, *, max_steps: int) -> None:
    """Step with the last action, and choose the next one unless the episode has ended."""
    obs, reward, _, _, recording.episode = env.step(recording.actions[-1])
    recording.rewards.append(reward)
    recording.capped = recording.episode is None and recording.num_steps >= max_steps
    recording.add(policy, env, obs)


def record_episode(policy: Policy, env: Env, *, seed: int, greedy: bool = False, max_steps: int = 16_384) -> Recording:
    """Play one episode of level ``seed``, capped at ``max_steps`` steps."""
    recording = begin_episode(policy, env, seed, greedy=greedy)
    while not recording.over:
        step_episode(policy, env, recording, max_steps=max_steps)
    return recording


def failed(recording: Recording) -> bool | None:
    """Whether the headline measure or "success" is below its maximum; None where capped, or without a maximum."""
    if recording.episode is None:
        return None
    spec, measures = recording.spec, recording.episode.measures
    if measures.get("success", 1) < 1:
        return True
    if spec.headline_max is None:
        return False if "success" in measures else None
    headline = recording.episode.ret if spec.headline == "return" else measures[spec.headline]
    return headline < spec.headline_max
