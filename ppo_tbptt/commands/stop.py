"""Clean ends of a run: on SIGINT, on SIGTERM, and when its time budget is used up."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic
from types import FrameType

TIMED_OUT = 124
"""Exit code when the time budget is used up, as of timeout(1)."""


class IterationAborted(BaseException):
    """Raised by the signal handler to break off an iteration that would take too long to finish."""


class Stop(ExitStack):
    """Note the first SIGINT or SIGTERM while active; a second one ends the process at once.

    Attributes:
        signal: number of the signal that came, else 0.
        deadline: end of the time budget on the monotonic clock.
        may_abort: called on a signal; if true, :class:`IterationAborted` is raised in the main thread.
        quiet: print nothing on a signal.
    """

    def __init__(self, *, minutes: float | None = None, quiet: bool = False) -> None:
        super().__init__()
        self.signal: int = 0
        self.deadline = float("inf") if minutes is None else monotonic() + 60 * minutes
        self.may_abort: Callable[[], bool] = lambda: False
        self.quiet = quiet

    def code(self, ahead: float = 0.0) -> int:
        """Return the exit code to stop with, 0 to go on; the time budget is looked at ``ahead`` seconds from now."""
        return 128 + self.signal if self.signal else TIMED_OUT * (monotonic() + ahead >= self.deadline)

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        aborts = self.may_abort()
        if not self.quiet:
            what = "" if aborts else " after this iteration"
            text = f"\nstopping{what}, with a checkpoint (once more to stop at once)\n"
            os.write(sys.stderr.fileno(), text.encode())
        if aborts:
            raise IterationAborted
