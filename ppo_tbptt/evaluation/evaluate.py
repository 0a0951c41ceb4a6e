"""Held-out evaluation: play each level seed exactly ``repeats`` times, whatever the length of its episodes."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import numpy as np
import torch

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvSpec, Episode, LevelSource
from ppo_tbptt.envs.batched import make_vector_env
from ppo_tbptt.evaluation.perturbations import Disturbance, EpisodeKey
from ppo_tbptt.evaluation.statistics import Estimate, estimate
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.ppo.acting import act
from ppo_tbptt.ppo.frames import CachedObservations

PARALLEL_EPISODES = 64
"""Episodes played side by side. Fixed, because the size of a batch may change the last bits of a network's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The outcome of :func:`evaluate`; ``dataclasses.asdict`` of it is what the JSON files hold."""

    env_id: str
    episodes: int
    seeds: list[int]
    repeats: int
    greedy: bool
    sampling_seed: int
    max_steps: int
    forget_every: int | None
    capped: int
    """Number of episodes that were truncated at ``max_steps``."""
    headline: str
    measures: dict[str, Estimate]
    """``return``, ``length`` and every measure of the task."""
    per_episode: list[dict[str, float]]
    """In order of level seed, then repeat: ``seed``, ``repeat``, ``return``, ``length``, ``capped`` and measures."""


class EpisodeQueue(LevelSource):
    """A level source: each level seed ``repeats`` times, in order, whichever environment is free; then idle."""

    def __init__(self, seeds: Sequence[int], repeats: int, num_envs: int) -> None:
        self._waiting = deque((seed, repeat) for seed in seeds for repeat in range(repeats))
        self._next: dict[int, EpisodeKey | None] = {}
        self.playing: list[EpisodeKey | None] = [None] * num_envs
        """What each environment plays, None where it is idle."""
        self.finished: list[tuple[EpisodeKey, Episode]] = []
        """As they ended."""

    def peek(self, env: int) -> int | None:
        """See :class:`~ppo_tbptt.envs.LevelSource`."""
        if env not in self._next:
            self._next[env] = self._waiting.popleft() if self._waiting else None
        key = self._next[env]
        return None if key is None else key[0]

    def begin(self, env: int) -> int | None:
        """See :class:`~ppo_tbptt.envs.LevelSource`."""
        seed = self.peek(env)
        self.playing[env] = self._next.pop(env)
        return seed

    def ended(self, env: int, episode: Episode) -> None:
        """See :class:`~ppo_tbptt.envs.LevelSource`."""
        key = self.playing[env]
        assert key is not None and key[0] == episode.seed, f"environment {env} ended an episode that it does not play"
        self.finished.append((key, episode))


def evaluate(
    agent: Agent,
    env: EnvConfig,
    *,
    seeds: Sequence[int],
    repeats: int = 3,
    greedy: bool = False,
    sampling_seed: int = 0,
    max_steps: int = 16_384,
    forget_every: int | None = None,
    disturb: Disturbance | None = None,
    num_workers: int | Literal["auto"] = "auto",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Play ``seeds`` x ``repeats`` episodes with ``agent`` and summarise them.

    Several run in parallel, each environment with its own recurrent state, reset where an episode starts. The same
    agent, seeds and ``sampling_seed`` (of the action noise) give the same numbers whatever the number of workers.
    Episodes longer than ``max_steps`` are truncated and count as capped. ``forget_every`` resets the recurrent state
    every so many steps of an episode; ``disturb`` (:mod:`ppo_tbptt.evaluation.perturbations`) changes it before each
    step. ``progress`` is called after every step with the number of finished episodes.

    Raises:
        EnvError: the environment does not exist or does not fit the agent.
        WorkerError: an environment failed.
    """
    num_envs = min(PARALLEL_EPISODES, len(seeds) * repeats)
    queue = EpisodeQueue(seeds, repeats, num_envs)
    limit = max_steps if env.max_episode_steps is None else min(max_steps, env.max_episode_steps)
    changes = {"num_envs": num_envs, "num_workers": num_workers, "max_episode_steps": limit, "previous": agent.previous}

    def generator(index: int) -> np.random.Generator:
        """Action noise is a function of the sampling seed and the episode's level seed and repeat alone."""
        return np.random.default_rng((sampling_seed, *(queue.playing[index] or ())))

    with agent.acting(), make_vector_env(env, queue, **changes) as envs:
        spec = envs.spec
        check_fits(agent, spec)
        envs.reset()
        observe = CachedObservations(envs, agent)
        generators = [generator(index) for index in range(num_envs)]
        state = agent.core.initial_state(num_envs)
        age = np.zeros(num_envs, dtype=np.int64)  # steps done in the current episode
        while any(episode is not None for episode in queue.playing):
            forget = age == 0 if forget_every is None else age % forget_every == 0
            state = agent.reset_state(state, torch.from_numpy(forget).to(agent.device))
            if disturb is not None:
                state = disturb(state, age, queue.playing)
            uniforms = None
            if not greedy:
                noise = [rng.random(len(agent.action_nvec), dtype=np.float32) for rng in generators]
                uniforms = torch.from_numpy(np.stack(noise)).to(agent.device)
            output = act(agent, observe(), state, uniforms)
            state = output.state_out
            result = envs.step(output.action.cpu())
            age = np.where(result.terminated | result.truncated, 0, age + 1)
            for episode in result.episodes:
                generators[episode.index] = generator(episode.index)
            if progress is not None:
                progress(len(queue.finished))
    rows: list[dict[str, Any]] = [
        {
            "seed": seed,
            "repeat": repeat,
            "return": episode.ret,
            "length": episode.length,
            "capped": int(not episode.terminated and episode.length == max_steps),
            **episode.measures,
        }
        for (seed, repeat), episode in sorted(queue.finished, key=itemgetter(0))
    ]
    return Evaluation(
        env_id=env.id,
        episodes=len(rows),
        seeds=list(seeds),
        repeats=repeats,
        greedy=greedy,
        sampling_seed=sampling_seed,
        max_steps=max_steps,
        forget_every=forget_every,
        capped=sum(row["capped"] for row in rows),
        headline=spec.headline,
        measures=_measures(rows, spec),
        per_episode=rows,
    )


def _measures(rows: list[dict[str, Any]], spec: EnvSpec) -> dict[str, Estimate]:
    """Estimate each measure over levels, where only some episodes report it over those."""
    names = [name for name in dict.fromkeys(chain(*rows)) if name not in ("seed", "repeat", "capped")]
    proportions = {"success", *([spec.headline] if spec.headline_max == 1.0 else [])}
    measures = {}
    for name in names:
        by_level: dict[int, list[float]] = {}
        for row in rows:
            if name in row:
                by_level.setdefault(row["seed"], []).append(row[name])
        measures[name] = estimate(list(by_level.values()), proportion=name in proportions)
    return measures
