"""Files that can't be written for a while: a full or read-only disk must not end a run, nor go unnoticed."""

from collections.abc import Callable
from time import monotonic


class UnwritableError(RuntimeError):
    """One line: what could not be written, for how long, and why."""


class Patience:
    """Tries to write, and goes on without where that fails, for up to ``minutes``.

    notes: lines for the user, one when something can't be written and one when it can again; the caller takes them.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self._since: dict[str, float] = {}
        self.notes: list[str] = []

    def attempt(self, name: str, write: Callable[[], None]) -> bool:
        """Call ``write``; whether it worked. ``name`` says what it writes.

        Raises:
            UnwritableError: ``name`` has not been written for longer than the patience lasts.
        """
        try:
            write()
        except OSError as error:
            reason = error.strerror or str(error)
            if name not in self._since:
                self._since[name] = self._clock()
                limit = f"for at most {self._minutes:g} minutes"
                self.notes.append(f"can't write {name} ({reason}); going on without {limit}, and trying again")
            if self._clock() - self._since[name] >= 60 * self._minutes:
                text = f"could not write {name} for {self._minutes:g} minutes ({reason}); what was written before stays"
                raise UnwritableError(text) from error
            return False
        if self._since.pop(name, None) is not None:
            self.notes.append(f"{name} could be written again")
        return True
