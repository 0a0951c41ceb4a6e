"""Disturbances of a playing agent's recurrent state, to find out what the state is good for.

Each acts before every step of the network on the state that is carried from one step of an episode to the next. The
initial state is never touched, because it remembers nothing.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

EpisodeKey = tuple[int, int]
"""Level seed and repeat."""

States = Float[Tensor, "N D"]

Disturbance = Callable[[States, np.ndarray, Sequence[EpisodeKey | None]], States]
"""``(state, age, episodes) -> state``.

age: steps done in the current episode, i64 ``[N]``; where it is 0 the state is the initial one.
episodes: what each environment plays, None where it is idle.
"""


class Shuffle:
    """Exchange states between running episodes of different levels at every step: typical states, but of others.

    Whole rows are permuted (h and c of an LSTM together), newly drawn at each step. Where more than half of the running
    episodes are of one level, some of them exchange with one another; where all are, each keeps its own. The draws are
    a function of ``seed`` and of the running episodes, not of the number of workers.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng((seed, 0, 0, 2))

    def __call__(self, state: States, age: np.ndarray, episodes: Sequence[EpisodeKey | None]) -> States:
        """Exchange the states of running episodes."""
        by_level: dict[int, list[int]] = {}
        for row, episode in enumerate(episodes):
            if episode is not None and age[row] > 0:
                by_level.setdefault(episode[0], []).append(row)
        if not by_level:
            return state
        groups = list(by_level.values())
        order = np.concatenate([self._rng.permutation(groups[i]) for i in self._rng.permutation(len(groups))])
        # A level's rows lie together, so that as many places on as the largest level has rows is another level.
        source = np.arange(len(state))
        source[order] = np.roll(order, max(map(len, groups)))
        return state[torch.from_numpy(source).to(state.device)]


class AddNoise:
    """Add Gaussian noise of standard deviation ``deviation`` ``[D]`` (one for each unit of the state) at every step.

    The noise of an episode is a function of ``seed``, its level seed and its repeat alone.
    """

    def __init__(self, deviation: Float[Tensor, "D"], seed: int) -> None:
        self._deviation = deviation
        self._seed = seed
        self._generators: dict[EpisodeKey, np.random.Generator] = {}

    def __call__(self, state: States, age: np.ndarray, episodes: Sequence[EpisodeKey | None]) -> States:
        """Add noise to the states of running episodes."""
        noise = np.zeros(tuple(state.shape), dtype=np.float32)
        for row, episode in enumerate(episodes):
            if episode is not None and age[row] > 0:
                if age[row] == 1:  # the 1 keeps it apart from the actions' noise
                    self._generators[episode] = np.random.default_rng((self._seed, *episode, 1))
                noise[row] = self._generators[episode].standard_normal(noise.shape[1], dtype=np.float32)
        return state + torch.from_numpy(noise).to(state.device) * self._deviation


class Measure:
    """Leave the state as it is, and measure the root mean square of each of its units."""

    def __init__(self) -> None:
        self._squares = torch.zeros(1, dtype=torch.float64)
        self._count = 0

    def __call__(self, state: States, age: np.ndarray, episodes: Sequence[EpisodeKey | None]) -> States:
        """Return ``state`` itself."""
        running = np.array([episode is not None for episode in episodes]) & (age > 0)
        rows = state[torch.from_numpy(running).to(state.device)]
        self._squares = self._squares.to(state.device) + rows.double().square().sum(0)
        self._count += len(rows)
        return state

    @property
    def rms(self) -> Float[Tensor, "D"]:
        """Over all steps of all episodes but the first of each; zero without any."""
        return (self._squares / max(1, self._count)).sqrt().float()
