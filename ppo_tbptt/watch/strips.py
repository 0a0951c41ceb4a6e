"""The recurrent state over time, and vectors, as coloured cells."""

from functools import cache

import numpy as np

MOST_UNITS = 64
"""Rows of the strip; of more units those that change most are shown."""


def select_units(states: np.ndarray) -> np.ndarray:
    """Which units to show, and in which order from top to bottom: i64 ``[R]`` with R <= :data:`MOST_UNITS`.

    ``states`` is f32 ``[T, D]``. Units that rise and fall together become neighbours: each unit is a point in the plane
    of the two strongest common movements, and they are taken by their angle.
    """
    changes = states - states.mean(0)
    units = np.argsort(-(changes**2).mean(0), kind="stable")[:MOST_UNITS]
    changes = changes[:, units]
    axes = np.linalg.eigh(changes.T @ changes)[1][:, -2:]  # [R, 2], or [1, 1] of a single unit
    return units[np.argsort(np.arctan2(axes[:, -1], axes[:, 0]), kind="stable")]


def largest(values: np.ndarray) -> float:
    """The end of a colour scale that is even about 0: almost all of ``values`` are within, single outliers are not."""
    return max(1e-3, float(np.quantile(np.abs(values), 0.995))) if values.size else 1.0


def colours(values: np.ndarray, end: float) -> np.ndarray:
    """Blue below 0, white at 0, red above, darkest at ``-end`` and ``end``: u8 ``[..., 3]`` for ``[...]``."""
    position = np.clip(values / end, -1, 1) * 127.5 + 127.5
    return _table()[position.round().astype(np.int64)]


@cache
def _table() -> np.ndarray:
    from matplotlib import colormaps  # here, because it is slow to import

    return (colormaps["RdBu_r"](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
