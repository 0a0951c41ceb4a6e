"""Random number generators of a training: action noise, minibatch permutations and the global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.runtime.distributed import World

State = dict[str, Tensor]


class TrainingRNG:
    """Generators seeded by the run's seed, the rank, and the environment steps done at that time.

    ``noise`` and ``permutation`` are CPU generators. Weights and dropout draw from torch's global generators (CPU and
    ``device``), and environments in this process may draw from those of NumPy and Python. The training has its own
    states of these global generators, which are installed inside of :meth:`installed` only.
    """

    def __init__(self, seed: int, world: World, device: torch.device) -> None:
        self._seed, self._world, self._device = seed, world, device
        self._installed = False
        self.noise = torch.Generator()
        self.permutation = torch.Generator()
        with preserved_globals(device):
            torch.manual_seed(seed)  # draws the weights, so it is the same on every rank
            self._globals = _get_globals(device)

    def seed(self, env_steps: int) -> None:
        """Seed all generators, except for torch's on rank 0 of a new run, which goes on after drawing the weights."""
        own, noise, permutation = self._seed, self._seed, self._seed + 1
        is_new = not self._world.rank and not env_steps
        if not is_new:
            entropy = np.random.SeedSequence((self._seed, self._world.rank, env_steps))
            own, noise, permutation = entropy.generate_state(3).tolist()
        self.noise.manual_seed(noise)
        self.permutation.manual_seed(permutation)
        with self.installed():
            if not is_new:
                torch.manual_seed(own)
            random.seed(own)
            np.random.seed(own)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the training's global RNG states, and put the caller's back at the end. May be nested."""
        if self._installed:
            yield
            return
        with preserved_globals(self._device):
            _set_globals(self._globals, self._device)
            self._installed = True
            try:
                yield
            finally:
                self._globals = _get_globals(self._device)
                self._installed = False

    def state_dict(self) -> dict[str, Any]:
        """Gather the RNG states of rank 0 and of the other ranks. All ranks call it together."""
        own = dict(_get_globals(self._device) if self._installed else self._globals)
        own |= {"noise": self.noise.get_state(), "permutation": self.permutation.get_state()}
        gathered = {name: self._world.gather(x) for name, x in own.items()}
        first, *others = [{name: xs[rank] for name, xs in gathered.items()} for rank in range(self._world.size)]
        return {"generators": first, "generators_of_other_ranks": others}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """Restore this rank's RNG states, saved by as many ranks as there are now."""
        own = dict([tree["generators"], *tree["generators_of_other_ranks"]][self._world.rank])
        self.noise.set_state(own.pop("noise"))
        self.permutation.set_state(own.pop("permutation"))
        with self.installed():
            _set_globals(own, self._device)


@contextmanager
def preserved_globals(device: torch.device) -> Iterator[None]:
    """Restore the global RNG states at the end."""
    before = _get_globals(device)
    try:
        yield
    finally:
        _set_globals(before, device)


def _get_globals(device: torch.device) -> State:
    """Return the states; those of NumPy and Python as f64 [627], which holds their 32-bit words exactly."""
    _, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    _, words, python_gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*map(int, key), position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor([*words, python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_globals(states: State, device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    *key, position, has_gauss, gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), int(position), int(has_gauss), gauss))
    *words, has_gauss, gauss = states["python"].tolist()
    random.setstate((3, tuple(map(int, words)), gauss if has_gauss else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
