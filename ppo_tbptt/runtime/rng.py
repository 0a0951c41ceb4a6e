"""The random streams of a rank: action noise, minibatches, and the global ones (of them torch makes the dropout)."""

import random

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ppo_tbptt.runtime.distributed import World


class Streams:
    """Functions of the seed, the rank and the number of steps done when they begin.

    noise, permutation: generators on the CPU. The global ones of torch (also of ``device``), NumPy and Python go on
    with them, for whatever uses those (an environment in this process, say).
    """

    def __init__(self, seed: int, world: World, device: torch.device) -> None:
        self._seed, self._world, self._device = seed, world, device
        self.noise = torch.Generator()
        self.permutation = torch.Generator()
        self.begin(0)

    def begin(self, env_steps: int) -> None:
        """Begin anew. Rank 0 of a new run lets torch's stream go on from where it made the weights."""
        own = noise = self._seed
        permutation = self._seed + 1
        if self._world.rank or env_steps:
            entropy = np.random.SeedSequence((self._seed, self._world.rank, env_steps))
            own, noise, permutation = entropy.generate_state(3).tolist()
            torch.manual_seed(own)
        random.seed(own)
        np.random.seed(own)
        self.noise.manual_seed(noise)
        self.permutation.manual_seed(permutation)

    def state(self) -> list[dict[str, Tensor]]:
        """Those of every rank, by rank; all ranks call it together."""
        own = {"torch": torch.get_rng_state(), "noise": self.noise.get_state()}
        own["permutation"] = self.permutation.get_state()
        own["numpy"], own["python"] = _numpy_state(), _python_state()
        if self._device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self._device)
        gathered = {name: self._world.gather(x) for name, x in own.items()}
        return [{name: xs[rank] for name, xs in gathered.items()} for rank in range(self._world.size)]

    def load_state(self, ranks: list[dict[str, Tensor]]) -> None:
        """Go on where `state` was taken, with as many ranks."""
        own = ranks[self._world.rank]
        torch.set_rng_state(own["torch"])
        self.noise.set_state(own["noise"])
        self.permutation.set_state(own["permutation"])
        *key, position, has_gauss, gauss = own["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(key, np.uint32), int(position), int(has_gauss), gauss))
        *words, has_gauss, gauss = own["python"].tolist()
        random.setstate((3, tuple(map(int, words)), gauss if has_gauss else None))
        if self._device.type == "cuda" and "cuda" in own:
            torch.cuda.set_rng_state(own["cuda"], self._device)


def _numpy_state() -> Float64[Tensor, "627"]:
    """NumPy's Mersenne twister: 624 words (a double holds each exactly), position, and a normal number kept over."""
    _, key, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return torch.tensor([*map(int, key), position, has_gauss, gauss], dtype=torch.float64)


def _python_state() -> Float64[Tensor, "627"]:
    _, words, gauss = random.getstate()
    return torch.tensor([*words, gauss is not None, gauss or 0.0], dtype=torch.float64)
