"""The random streams of a rank: action noise, minibatches, and torch's own (dropout)."""

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.distributed import World


class Streams:
    """Functions of the seed, the rank and the number of steps done when they begin.

    noise, permutation: generators on the CPU. torch's global one is the third.
    """

    def __init__(self, seed: int, world: World) -> None:
        self._seed, self._world = seed, world
        self.noise = torch.Generator()
        self.permutation = torch.Generator()
        self.begin(0)

    def begin(self, env_steps: int) -> None:
        """Begin anew. Rank 0 of a new run lets torch's stream go on from where it made the weights."""
        noise, permutation = self._seed, self._seed + 1
        if self._world.rank or env_steps:
            entropy = np.random.SeedSequence((self._seed, self._world.rank, env_steps))
            own, noise, permutation = entropy.generate_state(3).tolist()
            torch.manual_seed(own)
        self.noise.manual_seed(noise)
        self.permutation.manual_seed(permutation)

    def state(self) -> list[dict[str, Tensor]]:
        """Those of every rank, by rank; all ranks call it together."""
        own = {"torch": torch.get_rng_state(), "noise": self.noise.get_state()}
        own["permutation"] = self.permutation.get_state()
        gathered = {name: self._world.gather(x) for name, x in own.items()}
        return [{name: xs[rank] for name, xs in gathered.items()} for rank in range(self._world.size)]

    def load_state(self, ranks: list[dict[str, Tensor]]) -> None:
        """Go on where `state` was taken, with as many ranks."""
        own = ranks[self._world.rank]
        torch.set_rng_state(own["torch"])
        self.noise.set_state(own["noise"])
        self.permutation.set_state(own["permutation"])
