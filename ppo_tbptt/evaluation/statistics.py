"""Means with 95 % intervals, over level seeds or over runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval; ``ci95`` is None for a single sample."""

    mean: float
    ci95: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON takes them."""
        return {"mean": self.mean, "ci95": None if self.ci95 is None else list(self.ci95)}


def estimate(per_level: Sequence[Sequence[float]], *, proportion: bool) -> Estimate:
    """Estimate a measure from its values on each level, played one or more times; all levels weigh the same.

    Episodes of one level are not independent, so the interval is a percentile bootstrap over the levels' means. Where
    all levels agree, its width is 0.

    Args:
        per_level: the values of each level's episodes.
        proportion: the measure is between 0 and 1. If it is 0 or 1 everywhere, the interval is Wilson's, with one
            trial per level.
    """
    means = np.array([np.mean(values) for values in per_level], dtype=np.float64)
    mean = float(means.mean())
    if len(means) < 2:
        return Estimate(mean=mean, ci95=None)
    if np.ptp(means) == 0:
        if proportion and means[0] in (0.0, 1.0):
            from scipy import stats

            wilson = stats.binomtest(int(means.sum()), len(means)).proportion_ci(method="wilson")
            return Estimate(mean=mean, ci95=(float(wilson.low), float(wilson.high)))
        return Estimate(mean=mean, ci95=(mean, mean))
    return Estimate(mean=mean, ci95=_bootstrap((means,), np.mean))


@dataclass(frozen=True, slots=True, kw_only=True)
class OverRuns:
    """Mean and interquartile mean over runs; the latter is the mean where there are fewer than four."""

    mean: Estimate
    iqm: Estimate


def over_runs(scores: Sequence[Sequence[float]]) -> OverRuns:
    """Estimate mean and interquartile mean over runs, pooled over tasks.

    The bootstrap resamples runs within each task, never levels or episodes, so the interval says how training with
    other seeds might turn out. With few runs it is too narrow: it never goes beyond the runs themselves.

    Args:
        scores: one list for each task with the score of each run. If any task has a single run, there is no interval.
    """
    from scipy import stats

    def mean(*samples: np.ndarray, axis: int = -1) -> Any:
        return np.mean(np.concatenate(samples, axis=axis), axis=axis)

    def iqm(*samples: np.ndarray, axis: int = -1) -> Any:
        return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)

    tasks = tuple(np.array(values, dtype=np.float64) for values in scores)

    def summary(statistic: Callable[..., Any]) -> Estimate:
        resampled = all(len(values) > 1 for values in tasks)
        return Estimate(mean=float(statistic(*tasks)), ci95=_bootstrap(tasks, statistic) if resampled else None)

    return OverRuns(mean=summary(mean), iqm=summary(iqm))


def _bootstrap(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    """Return the 95 % percentile interval of 10,000 resamples with a fixed seed."""
    from scipy import stats  # slow to import, and 60 MB that training without evaluation can spare

    rng = np.random.default_rng(0)
    result = stats.bootstrap(samples, statistic, n_resamples=10_000, method="percentile", vectorized=True, rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
