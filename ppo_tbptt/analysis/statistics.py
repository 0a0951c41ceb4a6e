"""Means and interquartile means over training runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_tbptt.evaluation.statistics import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class OverRuns:
    """``iqm`` is the mean of the middle half of the runs (of all, where there are fewer than four)."""

    mean: Estimate
    iqm: Estimate


def over_runs(scores: Sequence[Sequence[float]]) -> OverRuns:
    """Summarise ``scores``, one list for each task with one score for each run on it.

    The intervals are 95 % percentile intervals of a stratified bootstrap (10,000 resamples, fixed seed): within each
    task as many runs as there are get drawn with replacement, then mean and interquartile mean are taken over the runs
    of all tasks together. What is resampled are runs, never levels or episodes, so the interval says how another
    training with other seeds might turn out. Of few runs it is too narrow: of two it never goes beyond them, and runs
    that all agree leave it no width. A task with a single run can't be resampled: no interval then.
    """
    from scipy import stats  # here, because it takes a second

    def mean(*samples: np.ndarray, axis: int = -1) -> Any:
        return np.mean(np.concatenate(samples, axis=axis), axis=axis)

    def iqm(*samples: np.ndarray, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    strata = tuple(np.array(values, dtype=np.float64) for values in scores)

    def summary(statistic: Callable[..., Any]) -> Estimate:
        value = float(statistic(*strata))
        if any(len(values) < 2 for values in strata):
            return Estimate(mean=value, ci95=None)
        rng = np.random.default_rng(0)
        interval = stats.bootstrap(
            strata, statistic, n_resamples=10_000, method="percentile", vectorized=True, rng=rng
        ).confidence_interval
        return Estimate(mean=value, ci95=(float(interval.low), float(interval.high)))

    return OverRuns(mean=summary(mean), iqm=summary(iqm))
