"""How many worker processes to start: as many as this process may use cores."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from ppo_tbptt.envs.interface import EnvError

CGROUPS = Path("/sys/fs/cgroup")
"""Where a container sees its own control group."""


def resolve_workers(num_workers: int | Literal["auto"], num_envs: int) -> int:
    """Return the number of worker processes: `"auto"` is one per usable core; never more than `num_envs`.

    Raises:
        EnvError: `num_workers` is negative, or a word other than "auto".
    """
    if num_workers == "auto":
        num_workers = _usable_cores()
    if not isinstance(num_workers, int) or num_workers < 0:
        raise EnvError(f"num_workers must be 'auto' or at least 0, not {num_workers!r}")
    return min(num_workers, num_envs)


def _usable_cores() -> int:
    """Return how many cores the affinity and the CPU quota of the control group allow; part of a core counts as one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # version 2, version 1
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((CGROUPS / name).read_text(encoding="ascii") for name in names).split())
            return min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores
