"""Means with 95 % intervals over level seeds."""

from collections.abc import Sequence
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
