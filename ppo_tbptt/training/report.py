"""The scalars of an iteration by TensorBoard tag."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ppo_tbptt.envs import Episode, FaultBudget
from ppo_tbptt.ppo.collector import CollectedRollout
from ppo_tbptt.ppo.learner import UpdateStats
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Rollout, Targets

if TYPE_CHECKING:
    from ppo_tbptt.training.callbacks import Iteration


def headline(episode: Episode, name: str) -> float:
    """Return the headline measure ``name`` of an episode."""
    return episode.ret if name == "return" else episode.measures[name]


def iteration_scalars(
    iteration: "Iteration", collected: CollectedRollout, update: UpdateStats, timer: Timer
) -> dict[str, float]:
    """Compute all scalars of an iteration over all ranks."""
    trainer = iteration.trainer
    return {
        **episode_scalars(iteration.episodes),
        **update.scalars,
        **distinct_fraction(collected, trainer.world),
        **explained_variance(iteration.rollout, iteration.targets, trainer.world),
        **trainer.faults.scalars(),
        **time_scalars(timer, trainer.batch_size),
    }


def episode_scalars(episodes: list[Episode]) -> dict[str, float]:
    """Compute means over episodes: ``episode/*`` and ``env/*``; only the count where there are none."""
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


def gather_episodes(world: World, episodes: list[Episode]) -> list[Episode]:
    """Gather the episodes of all ranks, in order of rank."""
    if world.size == 1:
        return episodes
    rows = world.gather_json([episode.values() for episode in episodes])
    return [Episode(*fields) for row in rows for fields in row]


def explained_variance(rollout: Rollout, targets: Targets, world: World) -> dict[str, float]:
    """Compute 1 - Var(return - value) / Var(return); empty where all returns are equal."""
    variance = world.variance(targets.value_target)
    if variance == 0:
        return {}
    return {"policy/explained_variance": 1 - world.variance(targets.value_target - rollout.value) / variance}


def distinct_fraction(collected: CollectedRollout, world: World) -> dict[str, float]:
    """Average the share of distinct frames over ranks; empty where frames are not counted."""
    if collected.distinct_fraction is None:
        return {}
    total = world.sum_(torch.tensor([collected.distinct_fraction], dtype=torch.float64))
    return {"sequences/distinct_fraction": total.item() / world.size}


def time_scalars(timer: Timer, num_steps: int) -> dict[str, float]:
    """Compute steps per second, and each part's share of the iteration's time."""
    seconds = timer.total
    parts = {f"time/{part}": spent / seconds for part, spent in timer.seconds.items()}
    return {"time/steps_per_second": num_steps / seconds, "time/iteration_seconds": seconds, **parts}


class FaultCounts:
    """Counts faults over the whole run, across resumes. All ranks call the methods together."""

    def __init__(self, world: World, max_worker_restarts: int) -> None:
        self._world = world
        self.budget = FaultBudget(max_worker_restarts)
        """Shared by the environments of training and evaluation."""
        self._restarts_before = 0  # by the processes that trained the run before
        self.cut_episodes = 0
        self.nonfinite_updates = 0
        """All ranks skip the same updates, so each counts all of them."""

    def count(self, collected: CollectedRollout, update: UpdateStats, iteration: int, notes: list[str]) -> None:
        """Count the faults of an iteration and add a line to ``notes`` for each."""
        notes += collected.faults + collected.notes
        if update.num_nonfinite:
            text = f"iteration {iteration}: {update.num_nonfinite} of {update.num_updates} updates skipped"
            notes.append(f"{text}: loss or gradient was NaN or infinite")
        self.cut_episodes += collected.cut_episodes
        self.nonfinite_updates += update.num_nonfinite

    def scalars(self) -> dict[str, float]:
        """Return ``faults/*``, summed over all ranks."""
        worker_restarts, cut_episodes, _ = self._world.sum_(torch.tensor(self._local_counts())).tolist()
        return {
            "faults/worker_restarts": float(worker_restarts),
            "faults/cut_episodes": float(cut_episodes),
            "faults/nonfinite_updates": float(self.nonfinite_updates),
        }

    def state_dict(self) -> list[list[int]]:
        """Return the counts by rank."""
        return self._world.gather_json(self._local_counts())

    def load_state_dict(self, ranks: list[list[int]]) -> None:
        """Restore this rank's counts; with another number of ranks every rank takes those of rank 0."""
        own = ranks[self._world.rank if len(ranks) == self._world.size else 0]
        self._restarts_before, self.cut_episodes, self.nonfinite_updates = own

    def _local_counts(self) -> list[int]:
        return [self._restarts_before + self.budget.count, self.cut_episodes, self.nonfinite_updates]
