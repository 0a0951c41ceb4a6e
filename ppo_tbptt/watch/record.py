"""What happened in an episode, step by step: what was seen, and what went on in the agent."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvSpec, Episode, SingleEnv, make_env
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.watch.remote import RemoteEnv

Env = SingleEnv | RemoteEnv


@dataclass(frozen=True, slots=True)
class _Packed:
    """An array, compressed: frames are mostly plain, and a long episode has thousands of them."""

    data: bytes
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, array: np.ndarray) -> "_Packed":
        return cls(zlib.compress(np.ascontiguousarray(array).tobytes(), 1), array.shape, array.dtype.str)

    def array(self) -> np.ndarray:
        return np.frombuffer(zlib.decompress(self.data), self.dtype).reshape(self.shape)


@dataclass(slots=True, kw_only=True, eq=False)
class Recording:
    """One episode, or the part of it that was played so far.

    There is one entry of ``probs``, ``actions``, ``values`` and ``states`` for each observation that the agent was
    asked about: all of them, but for the last one of an episode that is over.
    """

    spec: EnvSpec
    seed: int
    greedy: bool
    probs: list[list[np.ndarray]] = field(default_factory=list)
    """By step, then branch: the probability of each choice, f32 ``[n]``."""
    actions: list[np.ndarray] = field(default_factory=list)
    """i64 ``[A]``"""
    values: list[float] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    """The recurrent state after the observation was seen, f32 ``[D]``."""
    rewards: list[float] = field(default_factory=list)
    """``rewards[t]`` came of ``actions[t]``."""
    episode: Episode | None = None
    """None until it has ended by itself."""
    cut: bool = False
    """No more steps will come, though the episode has not ended."""
    _seen: list[tuple[dict[str, _Packed], _Packed | None]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return len(self.rewards)

    @property
    def over(self) -> bool:
        return self.cut or self.episode is not None

    def obs(self, index: int) -> dict[str, np.ndarray]:
        """What the agent saw after ``index`` steps."""
        return {key: packed.array() for key, packed in self._seen[index][0].items()}

    def rendered(self, index: int) -> np.ndarray | None:
        """The environment's own picture after ``index`` steps, u8 ``[height, width, 3]``; None if it draws none."""
        packed = self._seen[index][1]
        return None if packed is None else packed.array()

    def see(self, obs: dict[str, np.ndarray], rendered: np.ndarray | None) -> None:
        """Add what there is to see after the last step."""
        picture = None if rendered is None else _Packed.of(rendered)
        self._seen.append(({key: _Packed.of(array) for key, array in obs.items()}, picture))


def begin(policy: Policy, env: Env, seed: int, *, greedy: bool = False) -> Recording:
    """Start an episode of level ``seed`` and choose the first action. The same seed samples the same actions.

    Raises:
        EnvError: the environment does not fit the agent.
    """
    if isinstance(env, SingleEnv):
        check_fits(policy.agent, env.spec)
    policy.reset(seed=seed)
    recording = Recording(spec=policy.spec, seed=seed, greedy=greedy)
    obs = env.reset(seed)
    recording.see(obs, env.render())
    _act(policy, recording, obs)
    return recording


def step(policy: Policy, env: Env, recording: Recording, *, max_steps: int) -> None:
    """Do the last action chosen, and choose the next one unless the episode is over by then."""
    obs, reward, _, _, recording.episode = env.step(recording.actions[-1])
    recording.rewards.append(reward)
    recording.see(obs, env.render())
    if recording.episode is None:
        recording.cut = recording.num_steps >= max_steps
        _act(policy, recording, obs)


def _act(policy: Policy, recording: Recording, obs: dict[str, np.ndarray]) -> None:
    action = policy.act(obs, greedy=recording.greedy)
    recording.actions.append(np.atleast_1d(np.asarray(action, dtype=np.int64)))
    recording.probs.append(policy.probs)
    recording.values.append(float(policy.value))  # type: ignore[arg-type]
    recording.states.append(policy.state)


def record(policy: Policy, env: Env, *, seed: int, greedy: bool = False, max_steps: int = 16_384) -> Recording:
    """Play one episode of level ``seed``, and cut it after ``max_steps`` steps."""
    recording = begin(policy, env, seed, greedy=greedy)
    while not recording.over:
        step(policy, env, recording, max_steps=max_steps)
    return recording


@contextmanager
def watched_env(config: EnvConfig) -> Iterator[SingleEnv]:
    """The environment, with its picture of the ground truth where it can draw one.

    Raises:
        EnvError: see :func:`~ppo_tbptt.envs.make_env`.
    """
    options, limit = config.options, config.max_episode_steps
    env = make_env(config.id, options=options, max_episode_steps=limit, render_mode="ground_truth")
    try:
        yield env
    finally:
        env.close()


def failed(recording: Recording) -> bool | None:
    """Whether the task was not solved: its headline measure, or "success", is below its maximum.

    None where that can't be said: the episode was cut, or the task has no maximum.
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
