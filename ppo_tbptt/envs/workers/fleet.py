"""All environments of a trainer: one vector, or two halves of which one steps while the agent acts for the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvSpec, EpisodeJournal, LevelSeeds, Restarts, VectorEnv

HALVES_FROM = 256
"""Environments from which on two halves are the default on CUDA. With fewer a step of the environments takes less time
than acting for a half, which hardly depends on its size, so that acting twice costs more than it hides. By reckoning
with 16 cores, not measured."""


@dataclass(frozen=True, slots=True)
class Part:
    """Environments that step together, and the level seeds that they play."""

    envs: VectorEnv
    seeds: LevelSeeds
    rows: slice
    """Which of the fleet's environments they are."""

    def begin(self) -> None:
        """Begin an episode in every environment."""
        lost = self.envs.reset(self.seeds.current)
        self.seeds.advance(np.ones(self.envs.num_envs, dtype=np.bool_))
        self.restart(lost)

    def restart(self, lost: np.ndarray | None) -> None:
        """Begin new episodes where they are lost, each try with the next level seeds."""
        while lost is not None:
            current = self.seeds.current
            self.seeds.advance(lost)
            lost = self.envs.restart(current)

    def restore(
        self, journals: Sequence[EpisodeJournal], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """As of :meth:`VectorEnv.restore`; where an episode cannot be gone on with, the next level begins."""
        exact = self.envs.restore(journals, self.seeds.current, progress)
        self.seeds.advance(~exact)
        return exact


class Fleet:
    """The parts as one, their environments numbered through."""

    def __init__(self, parts: Sequence[tuple[VectorEnv, LevelSeeds]]) -> None:
        self.parts: list[Part] = []
        for envs, seeds in parts:
            self.parts.append(Part(envs, seeds, slice(self.num_envs, self.num_envs + envs.num_envs)))

    @property
    def num_envs(self) -> int:
        return sum(part.envs.num_envs for part in self.parts)

    @property
    def spec(self) -> EnvSpec:
        return self.parts[0].envs.spec

    @property
    def num_workers(self) -> int:
        """Processes that step at the same time."""
        return self.parts[0].envs.num_workers

    @property
    def where(self) -> str:
        """For the user: `in 2 workers`."""
        workers = f"{self.num_workers} worker{'s' if self.num_workers > 1 else ''}" if self.num_workers else ""
        if len(self.parts) > 1:
            return f"in two halves {f'of {workers} each' if workers else 'in this process'}"
        return f"in {workers or 'this process'}"

    @property
    def worker_pids(self) -> list[int]:
        return [pid for part in self.parts for pid in part.envs.worker_pids]

    @property
    def restarts(self) -> Restarts:
        """The parts count together."""
        return self.parts[0].envs.restarts

    def take_faults(self) -> list[str]:
        return [fault for part in self.parts for fault in part.envs.take_faults()]

    def journal(self) -> list[EpisodeJournal]:
        return [journal for part in self.parts for journal in part.envs.journal()]

    def restore(
        self, journals: Sequence[EpisodeJournal], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Of every environment, bool ``[N]``; see :meth:`Part.restore`."""
        exact = []
        for part in self.parts:

            def shown(done: int, _: int, first: int = part.rows.start) -> None:
                if progress is not None:
                    progress(first + done, self.num_envs)

            exact.append(part.restore(journals[part.rows], shown))
        return np.concatenate(exact)

    def seed_counts(self) -> list[int]:
        """How many level seeds each environment has used."""
        return [count for part in self.parts for count in part.seeds.state()]

    def load_seed_counts(self, counts: Sequence[int]) -> None:
        """Raises:
        ValueError: they are of another number of environments, or negative.
        """
        if len(counts) != self.num_envs:
            raise ValueError(f"level seeds of {len(counts)} environments, not {self.num_envs}")
        for part in self.parts:
            part.seeds.load_state(counts[part.rows])

    def close(self) -> None:
        for part in self.parts:
            part.envs.close()


def build_fleet(env: EnvConfig, *, seed: int, first_env: int, num_workers: int | Literal["auto"], cuda: bool) -> Fleet:
    """The config's environments. ``first_env`` numbers the first one among those of all ranks.

    Each half has workers of its own, so that one's can step on all cores while the other's wait for their actions.
    Which environments are in which half depends on their number alone.

    Raises:
        EnvError, WorkerError: see :class:`VectorEnv`.
    """
    sizes = [env.num_envs]
    halves = {"auto": cuda and env.num_envs >= HALVES_FROM, "on": True, "off": False}[env.double_buffering]
    if halves and env.num_envs > 1:
        sizes = [env.num_envs - env.num_envs // 2, env.num_envs // 2]
    restarts = Restarts(env.max_worker_restarts)
    parts: list[tuple[VectorEnv, LevelSeeds]] = []
    try:
        for size in sizes:
            seeds = LevelSeeds(seed, size, env.first_seed, env.num_seeds, first_env)
            envs = VectorEnv(
                env.id,
                num_envs=size,
                num_workers=num_workers,
                options=env.options,
                max_episode_steps=env.max_episode_steps,
                step_timeout=env.step_timeout,
                restarts=restarts,
                journal=env.replay,
            )
            parts.append((envs, seeds))
            first_env += size
    except BaseException:
        Fleet(parts).close()
        raise
    return Fleet(parts)
