"""The figures of an iteration by their tags."""

from dataclasses import dataclass

import numpy as np
import torch

from ppo_tbptt.envs import Episode, Restarts
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Rollout, Targets


def headline(episode: Episode, name: str) -> float:
    return episode.ret if name == "return" else episode.measures[name]


def episode_scalars(episodes: list[Episode]) -> dict[str, float]:
    """Means over the episodes that ended in this iteration; nothing where none did."""
    columns: dict[str, list[float]] = {}
    for episode in episodes:
        columns.setdefault("episode/return", []).append(episode.ret)
        columns.setdefault("episode/length", []).append(float(episode.length))
        for name, value in episode.measures.items():
            columns.setdefault(f"episode/{name}", []).append(value)
        for name, value in episode.env.items():
            columns.setdefault(f"env/{name}", []).append(value)
    count = {"episode/count": float(len(episodes))}
    return count | {tag: float(np.mean(values)) for tag, values in columns.items()}


def explained_variance(rollout: Rollout, targets: Targets, world: World) -> dict[str, float]:
    """1 - Var(return - value) / Var(return); nothing where all returns are equal."""
    variance = world.variance(targets.value_target)
    if variance == 0:
        return {}
    return {"policy/explained_variance": 1 - world.variance(targets.value_target - rollout.value) / variance}


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
