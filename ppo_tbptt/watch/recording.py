"""Recordings of episodes: observations, the agent's outputs and its recurrent state at every step."""

import zlib
from dataclasses import dataclass, field

import numpy as np

from ppo_tbptt.envs import EnvSpec, Episode, SingleEnv
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.watch.environment import Env


@dataclass(frozen=True, slots=True)
class _Compressed:
    """A compressed array: frames compress well, and a long episode has thousands of them."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> "_Compressed":
        return cls(zlib.compress(np.ascontiguousarray(array).tobytes(), 1), array.shape, array.dtype.str)

    def array(self) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self.data), self.dtype).reshape(self.shape)


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
        return {key: packed.array() for key, packed in self._views[index][0].items()}

    def rendered(self, index: int) -> np.ndarray | None:
        """Return the environment's rendering after ``index`` steps, u8 ``[height, width, 3]``, or None without one."""
        packed = self._views[index][1]
        return None if packed is None else packed.array()

    def add_view(self, obs: dict[str, np.ndarray], rendered: np.ndarray | None) -> None:
        """Append the observation and rendering after the last step."""
        picture = None if rendered is None else _Compressed.of(rendered)
        self._views.append(({key: _Compressed.of(array) for key, array in obs.items()}, picture))


def begin_episode(policy: Policy, env: Env, seed: int, *, greedy: bool = False) -> Recording:
    """Reset to level ``seed`` and choose the first action. The same seed samples the same actions.

    Raises:
        EnvError: the environment does not fit the agent.
    """
    if isinstance(env, SingleEnv):
        check_fits(policy.agent, env.spec)
    policy.reset(seed=seed)
    recording = Recording(spec=policy.spec, seed=seed, greedy=greedy)
    obs = env.reset(seed)
    recording.add_view(obs, env.render())
    _choose_action(policy, recording, obs)
    return recording


def step_episode(policy: Policy, env: Env, recording: Recording, *, max_steps: int) -> None:
    """Step with the last action, and choose the next one unless the episode has ended."""
    obs, reward, _, _, recording.episode = env.step(recording.actions[-1])
    recording.rewards.append(reward)
    recording.add_view(obs, env.render())
    if recording.episode is None:
        recording.capped = recording.num_steps >= max_steps
        _choose_action(policy, recording, obs)


def _choose_action(policy: Policy, recording: Recording, obs: dict[str, np.ndarray]) -> None:
    action = policy.act(obs, greedy=recording.greedy)
    recording.actions.append(np.atleast_1d(np.asarray(action, dtype=np.int64)))
    recording.probs.append(policy.probs)
    recording.values.append(float(policy.value))  # type: ignore[arg-type]
    recording.states.append(policy.state)


def record_episode(policy: Policy, env: Env, *, seed: int, greedy: bool = False, max_steps: int = 16_384) -> Recording:
    """Play one episode of level ``seed``, capped at ``max_steps`` steps."""
    recording = begin_episode(policy, env, seed, greedy=greedy)
    while not recording.over:
        step_episode(policy, env, recording, max_steps=max_steps)
    return recording


def failed(recording: Recording) -> bool | None:
    """Whether the headline measure or "success" is below its maximum.

    Returns:
        None where the episode was capped or the task has no maximum.
    """
    if recording.episode is None:
        return None
    spec, measures = recording.spec, recording.episode.measures
    if "success" in measures and measures["success"] < 1:
        return True
    if spec.headline_max is None:
        return False if "success" in measures else None
    headline = recording.episode.ret if spec.headline == "return" else measures[spec.headline]
    return headline < spec.headline_max
