"""Level sources: which level each environment plays next."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ppo_tbptt.envs.interface import Episode


class LevelSource(ABC):
    """Draws the level seed of every new episode, and hears how episodes ended.

    A batch of environments peeks one level ahead, to begin an episode in the step that ends the last one. What an
    episode's end teaches therefore shows from the same environment's next draw but one.
    """

    @abstractmethod
    def peek(self, env: int) -> int | None:
        """Return the level seed of the environment's next episode, None to leave it idle: the same until `begin`."""

    @abstractmethod
    def begin(self, env: int) -> int | None:
        """Return what `peek` does, and move on: the episode begins now."""

    def stage(self, env: int) -> int:
        """Return whose options the level that `peek` returns has: 0 the task's own, from 1 on those of a stage."""
        return 0

    def ended(self, env: int, episode: Episode) -> None:
        """Learn from an episode that has ended. Never called for one that a fault ended."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings and lists that `load_state_dict` goes on from."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        return


class LevelSeeds(LevelSource):
    """One stream of level seeds per environment, each uniform over `[first_seed, first_seed + num_seeds)`.

    The k-th seed of environment i is a function of (seed, i, k) alone: neither the number of environments nor which
    of them finishes first changes it, and a checkpoint needs only the counts k.
    """

    def __init__(self, seed: int, num_envs: int, first_seed: int, num_seeds: int, first_env: int = 0) -> None:
        """Start every stream at its first seed. `first_env` numbers the first environment among those of all ranks."""
        self._seed, self._first, self._num, self._first_env = seed, first_seed, num_seeds, first_env
        self._counts = [0] * num_envs
        self._next = [self._draw(env) for env in range(num_envs)]

    def peek(self, env: int) -> int:
        """See `LevelSource`."""
        return self._next[env]

    def begin(self, env: int) -> int:
        """See `LevelSource`."""
        seed = self._next[env]
        self._counts[env] += 1
        self._next[env] = self._draw(env)
        return seed

    def state_dict(self) -> dict[str, list[int]]:
        """Return `counts`: how many seeds of each stream have been used."""
        return {"counts": list(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: it belongs to another number of environments, or holds a negative count.
        """
        counts = [int(count) for count in state["counts"]]
        if len(counts) != len(self._counts) or min(counts) < 0:
            raise ValueError(f"expected {len(self._counts)} counts that are not negative, got {counts}")
        self._counts = counts
        self._next = [self._draw(env) for env in range(len(counts))]

    def _draw(self, env: int) -> int:
        return self._first + int(self._generator(env).integers(self._num))

    def _generator(self, env: int, *stream: int) -> np.random.Generator:
        """Make a generator for the environment's next level; `stream` tells it from others for the same level."""
        key = (self._first_env + env, self._counts[env], *stream)
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(self._seed, spawn_key=key)))


class Curriculum(LevelSeeds):
    """Level seeds as `LevelSeeds` draws them, each with a stage: a set of options, from the easiest to the hardest.

    A level has the task's own options (stage 0) with probability `own_share`, else those of a stage, uniform over the
    open ones 1..k. k starts at 1, and is raised when the newest stage is mastered. The stage of environment i's n-th
    level is a function of (seed, i, n) and of k when it is drawn, one level ahead. First levels are drawn from all
    stages, so that environments which start together do not stay in phase where the length of an episode depends on
    its stage.

    open_stages: k.
    """

    def __init__(
        self,
        seed: int,
        num_envs: int,
        first_seed: int,
        num_seeds: int,
        first_env: int = 0,
        *,
        num_stages: int,
        own_share: float,
        threshold: float,
        episodes: int,
    ) -> None:
        """Start with the first of `num_stages`. Positional arguments are those of `LevelSeeds`.

        The newest stage is mastered when the mean score of its last `episodes` episodes is at least `threshold`.
        """
        super().__init__(seed, num_envs, first_seed, num_seeds, first_env)
        self._num_stages, self._own_share, self._threshold = num_stages, own_share, threshold
        self.open_stages = 1
        self._scores: deque[float] = deque(maxlen=episodes)
        self._next_stage = [self._draw_stage(env) for env in range(len(self._counts))]

    @property
    def score(self) -> float | None:
        """The mean over the newest stage's last episodes; None where there is none yet."""
        return float(np.mean(self._scores)) if self._scores else None

    def stage(self, env: int) -> int:
        """See `LevelSource`."""
        return self._next_stage[env]

    def begin(self, env: int) -> int:
        """See `LevelSource`."""
        seed = super().begin(env)
        self._next_stage[env] = self._draw_stage(env)
        return seed

    def add_scores(self, scores: Iterable[tuple[int, float]]) -> None:
        """Add (stage, score) of episodes, in the order in which they ended; only those of the newest stage count."""
        self._scores.extend(score for stage, score in scores if stage == self.open_stages)

    def advance(self) -> bool:
        """Open the next stage if there is one and the newest is mastered, and return whether it was opened."""
        is_last, enough = self.open_stages == self._num_stages, len(self._scores) == self._scores.maxlen
        if is_last or not enough or (self.score or 0) < self._threshold:
            return False
        self.open_stages += 1
        self._scores.clear()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return `counts`, `next_stages` (those drawn already, by environment), `open_stages` and `scores`."""
        own = {"next_stages": list(self._next_stage), "open_stages": self.open_stages, "scores": list(self._scores)}
        return super().state_dict() | own

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; environments without an entry in `next_stages` draw one.

        Raises:
            ValueError: it belongs to another number of environments or stages.
        """
        super().load_state_dict(state)
        open_stages, stages = int(state["open_stages"]), [int(stage) for stage in state["next_stages"]]
        if not 1 <= open_stages <= self._num_stages or not all(0 <= stage <= self._num_stages for stage in stages):
            raise ValueError(f"stages {open_stages}, {stages} where there are {self._num_stages}")
        self.open_stages = open_stages
        self._scores.clear()
        self._scores.extend(state["scores"])
        drawn = [self._draw_stage(env) for env in range(len(self._counts))]
        self._next_stage = (stages + drawn[len(stages) :])[: len(drawn)]

    def _draw_stage(self, env: int) -> int:
        generator = self._generator(env, 1)
        if generator.random() < self._own_share:
            return 0
        return 1 + int(generator.integers(self.open_stages if self._counts[env] else self._num_stages))
