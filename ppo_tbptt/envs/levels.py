"""Level sources: which level each environment plays next."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
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
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._first_env + env, self._counts[env]))
        return self._first + int(np.random.Generator(np.random.Philox(sequence)).integers(self._num))
