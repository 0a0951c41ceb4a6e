"""Peak memory of this process and its workers, with the pages that they share counted once."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import psutil
import torch

MEGABYTE = 10**6
INTERVAL_SECONDS = 0.05


@contextmanager
def peak_memory(device: torch.device) -> Iterator[dict[str, Any]]:
    """Sample in a thread every 50 ms how much memory this process and those below it hold.

    ``host``: the largest sum seen, in 10^6 bytes: proportional set sizes on Linux (a page shared by k processes counts
    1/k in each), resident sizes elsewhere. ``device``: in the end the most that tensors held on the GPU, None without
    one. A sample takes the kernel about 10 ms per GB, so don't time anything meanwhile.
    """
    peak: dict[str, Any] = {"host": 0.0, "device": None}
    done = Event()

    def sample() -> None:
        peak["host"] = max(peak["host"], sum(map(process_bytes, tree())) / MEGABYTE)

    def watch() -> None:
        while not done.wait(INTERVAL_SECONDS):
            sample()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        sample()
        if device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(device) / MEGABYTE


def tree() -> list[psutil.Process]:
    """Return this process and all below it."""
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def process_bytes(process: psutil.Process) -> int:
    """Return the memory of one process in bytes; 0 for one that has ended."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(memory, "pss", memory.rss)
