"""Means with 95 % intervals, over level seeds or over runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from math import comb, prod
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval; ``ci95`` is None for a single sample."""

    mean: float
    ci95: tuple[float, float] | None


def estimate(per_level: Sequence[Sequence[float]], *, proportion: bool) -> Estimate:
    """Estimate a measure from its values on each level, played one or more times; all levels weigh the same.

    Episodes of one level are not independent, so the interval is a percentile bootstrap over the levels' means. Where
    all levels agree, its width is 0; but where a ``proportion`` (a measure between 0 and 1) is 0 or 1 everywhere, it is
    Wilson's, with one trial per level.
    """
    means = np.array([np.mean(values) for values in per_level], dtype=np.float64)
    if proportion and len(means) > 1 and np.ptp(means) == 0 and means[0] in (0.0, 1.0):
        from scipy import stats

        wilson = stats.binomtest(int(means.sum()), len(means)).proportion_ci(method="wilson")
        return Estimate(mean=float(means[0]), ci95=(float(wilson.low), float(wilson.high)))
    return _bootstrap(means, np.mean)


def mean_over_runs(scores: Sequence[float]) -> Estimate:
    """Estimate the mean over runs: how training with other seeds might turn out.

    The bootstrap resamples runs, never levels or episodes. With few runs the interval is too narrow: it never goes
    beyond the runs themselves.
    """
    return _bootstrap(np.array(scores, dtype=np.float64), np.mean)


def iqm_over_runs(scores: Sequence[float]) -> Estimate:
    """Estimate the interquartile mean over runs like :func:`mean_over_runs`; below four runs it is the mean."""
    from scipy import stats

    return _bootstrap(np.array(scores, dtype=np.float64), lambda x, axis=-1: stats.trim_mean(x, 0.25, axis=axis))


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Test whether the means of two groups of runs differ: the two-sided p-value of the permutation test.

    If the groups do not differ, every way to deal the runs into groups of these sizes is as likely as the one that was
    seen. All ways are counted up to 10,000 of them. Of n runs each no value is below 2 / C(2n, n): 0.33 for two, 0.1
    for three, 0.008 for five.
    """
    from scipy import stats

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
        return x.mean(axis) - y.mean(axis)

    rng = np.random.default_rng(0)
    result = stats.permutation_test((a, b), difference, vectorized=True, n_resamples=10_000, rng=rng)
    return float(result.pvalue)


def stratified_permutation_p(strata: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Test whether two groups differ over several strata, such as lengths of a task; see :func:`permutation_p`.

    Runs are dealt anew within each stratum, and the statistic is the sum of the strata's differences of means. Three
    runs each in three strata can give 2 / C(6, 3)^3 = 0.0003, where those of one could give 0.1. Up to a million ways
    are counted, else 100,000 are drawn.
    """
    deals = [_differences(a, b) for a, b in strata]
    observed = sum(differences[0] for differences in deals)  # the deal that was seen comes first
    if prod(map(len, deals)) <= 10**6:
        sums = reduce(np.add.outer, deals).ravel()
    else:
        rng = np.random.default_rng(0)
        drawn = sum(rng.choice(differences, 10**5 - 1) for differences in deals)
        sums = np.append(drawn, observed)
    tolerance = 1e-9 * max(1.0, float(np.abs(sums).max()))
    one_sided = min(np.mean(sums >= observed - tolerance), np.mean(sums <= observed + tolerance))
    return min(1.0, 2 * float(one_sided))


def least_stratified_p(strata: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """Return the least value that :func:`stratified_permutation_p` can have with groups of these sizes."""
    return min(1.0, 2 / min(10**5, prod(comb(len(a) + len(b), len(a)) for a, b in strata)))


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """Return the difference of means for every way to deal the values of both groups, that of ``a`` and ``b`` first."""
    values = np.array([*a, *b], dtype=np.float64)
    chosen = np.array(list(combinations(range(len(values)), len(a))))
    of_a = values[chosen].sum(1)
    return of_a / len(a) - (values.sum() - of_a) / len(b)


def _bootstrap(samples: np.ndarray, statistic: Callable[..., Any]) -> Estimate:
    """Estimate ``statistic`` with the percentile interval of 10,000 resamples with a fixed seed."""
    value = float(statistic(samples))
    if len(samples) < 2:
        return Estimate(mean=value, ci95=None)
    if np.ptp(samples) == 0:
        return Estimate(mean=value, ci95=(value, value))
    from scipy import stats  # slow to import, and 60 MB that training without evaluation can spare

    rng = np.random.default_rng(0)
    result = stats.bootstrap((samples,), statistic, n_resamples=10_000, method="percentile", vectorized=True, rng=rng)
    return Estimate(mean=value, ci95=(float(result.confidence_interval.low), float(result.confidence_interval.high)))
