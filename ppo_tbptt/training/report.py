"""The figures of an iteration by their tags."""

from dataclasses import dataclass

import numpy as np
import torch

from ppo_tbptt.envs import Episode, FaultBudget
from ppo_tbptt.ppo.learner import UpdateStats
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


def update_scalars(stats: UpdateStats) -> dict[str, float]:
    loss = stats.loss
    return {
        "loss/total": loss["loss"],
        "loss/policy": loss["policy_loss"],
        "loss/value": loss["value_loss"],
        "policy/entropy": loss["entropy"],
        "policy/approx_kl": loss["approx_kl"],
        "policy/clip_fraction": loss["clip_fraction"],
        "optim/grad_norm": loss["grad_norm"],
        "optim/learning_rate": stats.learning_rate,
        "optim/entropy_coef": stats.entropy_coef,
        "optim/clip_range": stats.clip_range,
        "optim/updates": float(stats.num_updates),
        "sequences/count": float(stats.num_sequences),
        "sequences/mean_length": stats.mean_length,
        "sequences/padding_fraction": stats.padding_fraction,
    }


def explained_variance(rollout: Rollout, targets: Targets, world: World) -> dict[str, float]:
    """1 - Var(return - value) / Var(return); nothing where all returns are equal."""
    variance = world.variance(targets.ret)
    if variance == 0:
        return {}
    return {"policy/explained_variance": 1 - world.variance(targets.ret - rollout.value) / variance}


@dataclass(slots=True)
class FaultCounts:
    """Of one rank."""

    restarts_before: int = 0
    """Of workers, until this process went on with the run."""
    cut_episodes: int = 0
    nonfinite_updates: int = 0
    """Of all ranks, which skip them together."""

    def state(self, faults: FaultBudget) -> list[int]:
        """What ``FaultCounts(*state)`` goes on from; ``faults`` are this process's."""
        return [self.restarts_before + faults.count, self.cut_episodes, self.nonfinite_updates]

    def scalars(self, world: World, faults: FaultBudget) -> dict[str, float]:
        """Over all ranks, which call it together."""
        worker_restarts, cut_episodes, _ = torch.stack(world.gather(torch.tensor(self.state(faults)))).sum(0).tolist()
        return {
            "faults/worker_restarts": float(worker_restarts),
            "faults/cut_episodes": float(cut_episodes),
            "faults/nonfinite_updates": float(self.nonfinite_updates),
        }
