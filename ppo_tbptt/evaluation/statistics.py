"""Means with 95 % intervals over level seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and the 95 % interval around it; ``ci95`` is None where a single level seed allows no interval."""

    mean: float
    ci95: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "ci95": None if self.ci95 is None else list(self.ci95)}


def estimate(per_level: Sequence[Sequence[float]], *, proportion: bool) -> Estimate:
    """Mean of a measure over levels, each played one or more times (every level weighs the same).

    Episodes of one level are not independent, so levels are the unit: the interval is the percentile bootstrap over
    the levels' means (10,000 resamples, fixed seed). Where all levels agree the bootstrap has no width; a
    ``proportion`` (a measure between 0 and 1) that is 0 or 1 everywhere then gets Wilson's interval with one trial
    per level, anything else that is constant an interval of width 0.
    """
    from scipy import stats  # here, because it takes 60 MB and a second that training without evaluation can spare

    means = np.array([np.mean(values) for values in per_level], dtype=np.float64)
    mean = float(means.mean())
    if len(means) < 2:
        return Estimate(mean=mean, ci95=None)
    if np.ptp(means) == 0:
        if proportion and means[0] in (0.0, 1.0):
            wilson = stats.binomtest(int(means.sum()), len(means)).proportion_ci(method="wilson")
            return Estimate(mean=mean, ci95=(float(wilson.low), float(wilson.high)))
        return Estimate(mean=mean, ci95=(mean, mean))
    interval = stats.bootstrap(
        (means,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return Estimate(mean=mean, ci95=(float(interval.low), float(interval.high)))


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
