"""Learning curves of groups: means over runs, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo_tbptt.analysis.groups import Group
from ppo_tbptt.analysis.runs import Point
from ppo_tbptt.evaluation.statistics import over_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """Arrays ``[T]``; ``low`` and ``high`` bound the 95 % interval and are NaN where there is none."""

    env_steps: np.ndarray
    hours: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def held_out_curve(group: Group) -> LearningCurve | None:
    """Average the held-out results of the runs that have any; None where none has."""
    return _average([run.held_out for run in group.runs if run.held_out])


def training_curve(group: Group) -> LearningCurve | None:
    """Average the headline measure of training episodes; None where none has finished."""
    return _average([run.training for run in group.runs if run.training])


def _average(runs: Sequence[Sequence[Point]]) -> LearningCurve | None:
    """Average runs, interpolated linearly at all their steps, over the range of steps that all of them cover.

    The interval of a single run is its own, over level seeds; that of several is over runs.
    """
    if not runs:
        return None
    first, last = max(run[0].env_steps for run in runs), min(run[-1].env_steps for run in runs)
    steps = np.array(sorted({p.env_steps for run in runs for p in run if first <= p.env_steps <= last}), dtype=float)
    if not len(steps):
        return None
    own_steps = [np.array([point.env_steps for point in run], dtype=float) for run in runs]
    values = np.stack([np.interp(steps, own, [p.mean for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    hours = np.stack([np.interp(steps, own, [p.hours for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    if len(runs) == 1:
        known = {point.env_steps: point.ci95 for point in runs[0]}
        intervals = [known[step] for step in steps]
    else:
        intervals = [over_runs([column.tolist()]).mean.ci95 for column in values.T]
    low, high = np.array([interval or (np.nan, np.nan) for interval in intervals]).T
    return LearningCurve(env_steps=steps, hours=hours.mean(0), mean=values.mean(0), low=low, high=high)
