"""Peak memory of several processes, with the pages that they share counted once."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import TracebackType

import torch

MEGABYTE = 10**6
INTERVAL_SECONDS = 0.05


class PeakMemory:
    """While active, a thread looks every 50 ms at how much memory the processes hold.

    ``host_mb``: the largest sum seen, in 10^6 bytes: proportional set sizes on Linux (a page shared by k processes
    counts 1/k in each), resident sizes elsewhere. ``device_mb``: the most that tensors held on the GPU, None without
    one. A look takes the kernel about 10 ms per GB, so don't time anything meanwhile.
    """

    def __init__(self, pids: Sequence[int], device: torch.device) -> None:
        self.host_mb = 0.0
        self.device_mb: float | None = None
        self._pids = list(pids)
        self._device = device
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            self._look()
            if self._done.wait(INTERVAL_SECONDS):
                return

    def _look(self) -> None:
        self.host_mb = max(self.host_mb, sum(map(process_bytes, self._pids)) / MEGABYTE)

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
        self._look()
        if self._device.type == "cuda":
            self.device_mb = torch.cuda.max_memory_allocated(self._device) / MEGABYTE


def process_bytes(pid: int) -> int:
    """Memory of one process in bytes; 0 for one that has ended."""
    if not sys.platform.startswith("linux"):
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return int(done.stdout or 0) * 1024
    for name, key in (("smaps_rollup", "Pss:"), ("status", "VmRSS:")):  # not every kernel has the first
        try:
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0
