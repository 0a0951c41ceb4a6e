"""Peak memory of this process and its workers, with the pages that they share counted once."""

from threading import Event, Thread
from types import TracebackType

import psutil
import torch

MEGABYTE = 10**6
INTERVAL_SECONDS = 0.05


class PeakMemory:
    """While active, a thread samples every 50 ms how much memory this process and those below it hold.

    ``host_mb``: the largest sum seen, in 10^6 bytes: proportional set sizes on Linux (a page shared by k processes
    counts 1/k in each), resident sizes elsewhere. ``device_mb``: the most that tensors held on the GPU, None without
    one. A sample takes the kernel about 10 ms per GB, so don't time anything meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self.host_mb = 0.0
        self.device_mb: float | None = None
        self._device = device
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.host_mb = max(self.host_mb, sum(map(process_bytes, tree())) / MEGABYTE)

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        if self._device.type == "cuda":
            self.device_mb = torch.cuda.max_memory_allocated(self._device) / MEGABYTE


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
