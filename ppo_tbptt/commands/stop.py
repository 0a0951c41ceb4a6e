"""SIGINT, SIGTERM and a budget of time end a run cleanly."""

import os
import signal
import sys
from collections.abc import Callable
from time import monotonic
from types import FrameType, TracebackType

TIMED_OUT = 124
"""Exit code where the budget of time is used up, as that of timeout(1)."""


class Dropped(BaseException):
    """Raised by a signal, to break off an iteration that would take too long to finish."""


class Stop:
    """While active, the first SIGINT or SIGTERM is only noted; a second one ends the process at once.

    signal: the number of the one that came, else 0.
    deadline: when the budget of time is used up, on the monotonic clock; None for no budget.
    may_drop: asked when a signal comes: whether to break off what runs by raising `Dropped`.
    quiet: without saying so.
    """

    def __init__(self, *, minutes: float | None = None, quiet: bool = False) -> None:
        self.signal: int = 0
        self.deadline = None if minutes is None else monotonic() + 60 * minutes
        self.may_drop: Callable[[], bool] = lambda: False
        self.quiet = quiet
        self._before: dict[int, object] = {}

    @property
    def code(self) -> int:
        """The exit code to stop with now; 0 to go on."""
        return 128 + self.signal if self.signal else TIMED_OUT * self.is_late()

    def is_late(self, ahead: float = 0.0) -> bool:
        """Whether the budget will be used up in ``ahead`` seconds."""
        return self.deadline is not None and monotonic() + ahead >= self.deadline

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        drops = self.may_drop()
        if not self.quiet:
            what = "" if drops else " after this iteration"
            text = f"\nstopping{what}, with a checkpoint (once more to stop at once)\n"
            os.write(sys.stderr.fileno(), text.encode())
        if drops:
            raise Dropped

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
