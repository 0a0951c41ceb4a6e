"""Level seeds: which level each environment plays next."""

from collections.abc import Sequence

import numpy as np


class LevelSeeds:
    """One stream of level seeds per environment, each uniform over `[first_seed, first_seed + num_seeds)`.

    The k-th seed of environment i is a function of (seed, i, k) alone: neither the number of environments nor which
    of them finishes first changes it, and a restart needs only the counts k.
    """

    def __init__(self, seed: int, num_envs: int, first_seed: int, num_seeds: int, first_env: int = 0) -> None:
        """Start every stream at its first seed. The environments are numbered from `first_env` on.

        Raises:
            ValueError: `seed` or `first_seed` is negative, or `num_envs` or `num_seeds` is not positive.
        """
        if seed < 0 or first_seed < 0:
            raise ValueError(f"seeds must not be negative: seed = {seed}, first_seed = {first_seed}")
        if num_envs < 1 or num_seeds < 1:
            raise ValueError(f"must be at least 1: num_envs = {num_envs}, num_seeds = {num_seeds}")
        self._seed, self._first, self._num = seed, first_seed, num_seeds
        self._first_env = first_env
        self._counts = [0] * num_envs
        self._current = np.empty(num_envs, np.int64)
        self.load_state(self._counts)

    @property
    def current(self) -> np.ndarray:
        """The seed each environment's next episode starts from, i64 [N], a copy."""
        return self._current.copy()

    def advance(self, mask: np.ndarray) -> None:
        """Move on to the next seed where `mask` (bool [N]) says that the current one has been used."""
        mask = np.asarray(mask)
        if mask.shape != self._current.shape or mask.dtype != np.bool_:
            raise ValueError(f"mask must be bool of shape {self._current.shape}, not {mask.dtype} {mask.shape}")
        for index in np.flatnonzero(mask).tolist():
            self._counts[index] += 1
            self._current[index] = self._draw(index)

    def state(self) -> list[int]:
        """How many seeds of each stream have been used: all that `load_state` needs."""
        return list(self._counts)

    def load_state(self, state: Sequence[int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: it belongs to another number of environments, or holds a negative count.
        """
        counts = [int(count) for count in state]
        if len(counts) != len(self._current) or min(counts) < 0:
            raise ValueError(f"expected {len(self._current)} counts that are not negative, got {counts}")
        self._counts = counts
        for index in range(len(counts)):
            self._current[index] = self._draw(index)

    def _draw(self, index: int) -> int:
        sequence = np.random.SeedSequence(self._seed, spawn_key=(self._first_env + index, self._counts[index]))
        return self._first + int(np.random.Generator(np.random.Philox(sequence)).integers(self._num))
