"""How often something failed in a run, resumed or not."""

from dataclasses import dataclass

import torch

from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.envs import Restarts


@dataclass(slots=True)
class FaultCounts:
    """Of one rank."""

    restarts_before: int = 0
    """Of workers, until this process went on with the run."""
    cut_episodes: int = 0
    nonfinite_updates: int = 0
    """Of all ranks, which skip them together."""

    def state(self, restarts: Restarts) -> list[int]:
        """What ``FaultCounts(*state)`` goes on from; ``restarts`` are this process's."""
        return [self.restarts_before + restarts.count, self.cut_episodes, self.nonfinite_updates]

    def scalars(self, world: World, restarts: Restarts) -> dict[str, float]:
        """Over all ranks, which call it together."""
        worker_restarts, cut_episodes, _ = torch.stack(world.gather(torch.tensor(self.state(restarts)))).sum(0).tolist()
        return {
            "faults/worker_restarts": float(worker_restarts),
            "faults/cut_episodes": float(cut_episodes),
            "faults/nonfinite_updates": float(self.nonfinite_updates),
        }
