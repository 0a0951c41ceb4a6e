"""A group's learning curve: the mean over its runs, with an interval."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ppo_tbptt.analysis.groups import Group
from ppo_tbptt.analysis.runs import Point
from ppo_tbptt.evaluation.statistics import over_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """Arrays of one length; ``low`` and ``high`` bound the 95 % interval and are NaN where there is none."""

    env_steps: np.ndarray
    hours: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def held_out_curve(group: Group) -> LearningCurve | None:
    """Of the runs with held-out results; None where none has any."""
    return _over([run.held_out for run in group.runs if run.held_out])


def training_curve(group: Group) -> LearningCurve | None:
    """The same measure of training's own episodes; None where none was finished."""
    return _over([run.training for run in group.runs if run.training])


def _over(runs: Sequence[Sequence[Point]]) -> LearningCurve | None:
    """One run is taken as it is. Of several, each is interpolated linearly at the steps where any was evaluated, as far
    as all of them have come; hours are the mean over runs."""
    if not runs:
        return None
    if len(runs) == 1:
        bounds = [point.ci95 or (np.nan, np.nan) for point in runs[0]]
        return LearningCurve(
            env_steps=np.array([point.env_steps for point in runs[0]], dtype=float),
            hours=np.array([point.hours for point in runs[0]]),
            mean=np.array([point.mean for point in runs[0]]),
            low=np.array([low for low, _ in bounds]),
            high=np.array([high for _, high in bounds]),
        )
    first, last = max(run[0].env_steps for run in runs), min(run[-1].env_steps for run in runs)
    steps = np.array(sorted({p.env_steps for run in runs for p in run if first <= p.env_steps <= last}), dtype=float)
    if not len(steps):
        return None
    own_steps = [np.array([point.env_steps for point in run], dtype=float) for run in runs]
    values = np.stack([np.interp(steps, own, [p.mean for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    hours = np.stack([np.interp(steps, own, [p.hours for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    intervals = [over_runs([column.tolist()]).mean.ci95 or (np.nan, np.nan) for column in values.T]
    return LearningCurve(
        env_steps=steps,
        hours=hours.mean(0),
        mean=values.mean(0),
        low=np.array([low for low, _ in intervals]),
        high=np.array([high for _, high in intervals]),
    )
