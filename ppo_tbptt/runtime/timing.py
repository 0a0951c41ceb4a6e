"""Timing of an iteration, part by part."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Timer:
    """Seconds of wall time by part. Parts must not nest; on a GPU a part ends when its work is queued, not done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total = 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Measure the block's time as ``total``."""
        began = perf_counter()
        yield
        self.total = perf_counter() - began

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the block's time to ``seconds[part]``."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - began
