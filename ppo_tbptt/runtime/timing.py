"""Where an iteration's seconds go."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Timer:
    """Seconds by part. Parts may not nest; on a GPU a part ends when its work is queued, not when it is done."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total = 0.0

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Take the time of everything, parts or not, as ``total``."""
        began = perf_counter()
        yield
        self.total = perf_counter() - began

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - began
