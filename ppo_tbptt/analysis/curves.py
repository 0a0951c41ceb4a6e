"""Learning curves: means over runs, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo_tbptt.analysis.runs import Point
from ppo_tbptt.evaluation.statistics import mean_over_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """Arrays ``[T]``; ``low`` and ``high`` bound the 95 % interval and are NaN where there is none."""

    env_steps: np.ndarray
    hours: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def average(runs: Sequence[Sequence[Point]]) -> LearningCurve | None:
    """Average runs, interpolated linearly at all their steps, over the range of steps that all of them cover.

    Runs without points are left out; None where no steps are left. The interval of a single run is its own, over level
    seeds; that of several is over runs.
    """
    runs = [run for run in runs if run]
    first = max((run[0].env_steps for run in runs), default=0)
    last = min((run[-1].env_steps for run in runs), default=0)
    steps = np.array(sorted({p.env_steps for run in runs for p in run if first <= p.env_steps <= last}), dtype=float)
    if not len(steps):
        return None
    own_steps = [[point.env_steps for point in run] for run in runs]
    values = np.stack([np.interp(steps, own, [p.mean for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    hours = np.stack([np.interp(steps, own, [p.hours for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    if len(runs) == 1:
        known = {point.env_steps: point.ci95 for point in runs[0]}
        intervals = [known[step] for step in steps]
    else:
        intervals = [mean_over_runs(column.tolist()).ci95 for column in values.T]
    low, high = np.array([interval or (np.nan, np.nan) for interval in intervals]).T
    return LearningCurve(env_steps=steps, hours=hours.mean(0), mean=values.mean(0), low=low, high=high)
