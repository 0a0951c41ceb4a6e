"""SIGINT and SIGTERM end a run cleanly."""

import os
import signal
import sys
from types import FrameType, TracebackType


class Stop:
    """While active, the first SIGINT or SIGTERM is only noted in ``signal``; a second one ends the process at once.

    ``quiet``: without saying so.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.signal: int = 0
        self._quiet = quiet
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        if self._quiet:
            return
        text = "\nstopping after this iteration, with a checkpoint (once more to stop at once)\n"
        os.write(sys.stderr.fileno(), text.encode())

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
