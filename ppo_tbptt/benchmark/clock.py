"""Measure seconds per call, on a CPU or a GPU."""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch

MEASURE_SECONDS = 2.0
"""About how long a call is timed; at least ``BLOCKS`` times, however long it takes."""
BLOCKS = 5
WARMUP_CALLS = 2


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the median of ``BLOCKS`` blocks of calls; the device is waited for once per block."""
    for _ in range(WARMUP_CALLS):
        call()
    calls = max(1, int(MEASURE_SECONDS / BLOCKS / _block(call, 1, device)))
    return median(_block(call, calls, device) for _ in range(BLOCKS))


def _block(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Measure seconds per call over one block of ``calls``."""
    synchronize(device)
    began = perf_counter()
    for _ in range(calls):
        call()
    synchronize(device)
    return (perf_counter() - began) / calls
