"""Held-out evaluation: each level seed is played exactly ``repeats`` times, whatever the length of its episodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvSpec, Episode, VectorEnv
from ppo_tbptt.evaluation.perturbations import Disturbance, EpisodeKey
from ppo_tbptt.evaluation.statistics import Estimate, estimate
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.models.heads import mode, sample

PARALLEL_EPISODES = 64
"""Episodes in flight. Fixed, because the size of a batch may change the last bits of a network's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The outcome of :func:`evaluate`."""

    env_id: str
    seeds: list[int]
    repeats: int
    greedy: bool
    sampling_seed: int
    max_steps: int
    forget_every: int | None
    headline: str
    measures: dict[str, Estimate]
    """``return``, ``length`` and every measure of the task."""
    per_episode: list[dict[str, float]]
    """In order of level seed, then repeat: ``seed``, ``repeat``, ``return``, ``length``, ``capped`` and measures."""

    @property
    def capped(self) -> int:
        """Episodes that were cut at ``max_steps``."""
        return sum(int(row["capped"]) for row in self.per_episode)

    def to_dict(self) -> dict[str, Any]:
        return {
            "env_id": self.env_id,
            "episodes": len(self.per_episode),
            "seeds": self.seeds,
            "repeats": self.repeats,
            "greedy": self.greedy,
            "sampling_seed": self.sampling_seed,
            "max_steps": self.max_steps,
            "forget_every": self.forget_every,
            "capped": self.capped,
            "headline": self.headline,
            "measures": {name: e.to_dict() for name, e in self.measures.items()},
            "per_episode": self.per_episode,
        }


class _Jobs:
    """Which (level seed, repeat) each environment plays, and which it will play next."""

    def __init__(self, seeds: Sequence[int], repeats: int, num_envs: int) -> None:
        self._waiting = [(seed, repeat) for seed in seeds for repeat in range(repeats)][::-1]
        self.now: list[EpisodeKey | None] = [self._pop() for _ in range(num_envs)]
        self.next: list[EpisodeKey | None] = [self._pop() for _ in range(num_envs)]

    def _pop(self) -> EpisodeKey | None:
        return self._waiting.pop() if self._waiting else None

    def finish(self, env: int) -> EpisodeKey:
        done = self.now[env]
        if done is None:
            raise AssertionError(f"environment {env} ended an episode without having one to play")
        self.now[env], self.next[env] = self.next[env], self._pop()
        return done


def _seed_array(jobs: list[EpisodeKey | None]) -> np.ndarray:
    return np.array([-1 if job is None else job[0] for job in jobs], dtype=np.int64)


def _noise(job: EpisodeKey | None, sampling_seed: int) -> np.random.Generator:
    """The action noise of one episode: a function of the sampling seed, the level seed and the repeat alone."""
    return np.random.default_rng((sampling_seed, *(job or (0, 0))))


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
    agent, seeds and ``sampling_seed`` give the same numbers whatever the number of workers. An episode that reaches
    ``max_steps`` is cut there and counted as capped. ``forget_every = k`` wipes the recurrent state every k steps of
    an episode, which shows what the agent owes to its memory; ``disturb`` does anything else to it
    (:mod:`ppo_tbptt.evaluation.perturbations`). ``progress`` is called after every step with the number of finished episodes.

    Raises:
        EnvError: the environment does not fit the agent.
        EnvError, WorkerError: see :mod:`ppo_tbptt.envs`.
    """
    device, nvec = agent.device, agent.action_nvec
    num_envs = min(PARALLEL_EPISODES, len(seeds) * repeats)
    jobs = _Jobs(seeds, repeats, num_envs)
    own_limit = env.max_episode_steps
    limit = max_steps if own_limit is None else min(max_steps, own_limit)
    finished: list[tuple[int, Episode]] = []
    with (
        agent.acting(),
        VectorEnv(
            env.id,
            num_envs=num_envs,
            num_workers=num_workers,
            options=env.options,
            max_episode_steps=limit,
            step_timeout=env.step_timeout,
        ) as envs,
    ):
        spec = envs.spec
        check_fits(agent, spec)
        envs.reset(_seed_array(jobs.now))
        generators = [_noise(job, sampling_seed) for job in jobs.now]
        state = agent.core.initial_state(num_envs)
        age = np.zeros(num_envs, dtype=np.int64)  # steps done in the current episode
        while any(job is not None for job in jobs.now):
            obs = {key: torch.from_numpy(x).to(device, copy=True) for key, x in envs.obs.items()}
            wipe = age == 0 if forget_every is None else age % forget_every == 0
            state = agent.reset_state(state, torch.from_numpy(wipe).to(device))
            if disturb is not None:
                state = disturb(state, age, jobs.now)
            output = agent.step(obs, state)
            state = output.state_out
            if greedy:
                action = mode(output.logits, nvec)
            else:
                noise = np.stack([g.random(len(nvec), dtype=np.float32) for g in generators])
                action, _ = sample(output.logits, torch.from_numpy(noise).to(device), nvec)
            outcome = envs.step(action.cpu().numpy(), _seed_array(jobs.next))
            age = np.where(outcome.terminated | outcome.truncated, 0, age + 1)
            for episode in outcome.episodes:
                _, repeat = jobs.finish(episode.index)
                generators[episode.index] = _noise(jobs.now[episode.index], sampling_seed)
                finished.append((repeat, episode))
            if progress is not None:
                progress(len(finished))
    finished.sort(key=lambda item: (item[1].seed, item[0]))
    rows = [
        {
            "seed": episode.seed,
            "repeat": repeat,
            "return": episode.ret,
            "length": episode.length,
            "capped": int(not episode.terminated and episode.length == max_steps),
            **episode.measures,
        }
        for repeat, episode in finished
    ]
    return Evaluation(
        env_id=env.id,
        seeds=list(seeds),
        repeats=repeats,
        greedy=greedy,
        sampling_seed=sampling_seed,
        max_steps=max_steps,
        forget_every=forget_every,
        headline=spec.headline,
        measures=_measures(rows, spec),
        per_episode=rows,
    )


def _measures(rows: list[dict[str, float]], spec: EnvSpec) -> dict[str, Estimate]:
    """Each measure over levels. One that only some episodes report is taken over those."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name not in NOT_MEASURES]
    proportions = {"success"} | ({spec.headline} if spec.headline_max == 1.0 else set())
    measures = {}
    for name in names:
        by_level: dict[float, list[float]] = {}
        for row in rows:
            if name in row:
                by_level.setdefault(row["seed"], []).append(row[name])
        measures[name] = estimate(list(by_level.values()), proportion=name in proportions)
    return measures


NOT_MEASURES = frozenset({"seed", "repeat", "capped"})
