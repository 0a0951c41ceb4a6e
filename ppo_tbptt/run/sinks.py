"""What a trainer writes into its run's folder: metrics, checkpoints and the config, through a full disk too."""

import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from ppo_tbptt.config import Config
from ppo_tbptt.run.checkpoint import save_checkpoint
from ppo_tbptt.run.files import write_text
from ppo_tbptt.run.folder import RunDir, RunDirError, RunLock, remove_leftovers
from ppo_tbptt.run.metrics import MetricsWriter, Report
from ppo_tbptt.run.tensorboard import TensorBoard
from ppo_tbptt.runtime.errors import RunError


class UnwritableError(RunError):
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


RETRY_SECONDS = 30.0
"""A checkpoint that could not be written is tried again so much later."""


class RunWriter:
    """Holds the folder's lock until it is closed.

    run: the folder.  patience: with the notes about what could not be written.
    saved: iteration of the newest checkpoint, None where there is none.
    """

    def __init__(self, path: Path, config: Config, *, resumed_from: int | None = None, env_steps: int = 0) -> None:
        """``resumed_from``: the iteration to go on from, after ``env_steps``; None for a new run.

        Raises:
            RunDirError: the folder exists (new run) or is missing (resumed), can't be written, or another process
                trains there.
        """
        self.run = RunDir.create(path) if resumed_from is None else RunDir.open(path)
        self._lock = RunLock(path)
        try:
            remove_leftovers(self.run)
            write_text(self.run.config, config.to_toml())
            self._metrics = MetricsWriter(path, resume_from=resumed_from)
            self._board = TensorBoard(path, after=None if resumed_from is None else env_steps)
        except OSError as error:
            self._lock.release()
            raise RunDirError(f"{path}: can't write in this run folder ({error.strerror})") from error
        except BaseException:
            self._lock.release()
            raise
        self._keep = config.train.keep_checkpoints
        self._minutes = config.train.checkpoint_minutes
        self.patience = Patience(config.train.max_unwritable_minutes)
        self.saved = resumed_from
        self._saved_at = self._tried_at = monotonic()
        self._missed = False  # a checkpoint that was due
        self._unshown: list[Report] = []  # in TensorBoard

    def report(self, report: Report) -> None:
        """Into the metrics and TensorBoard; what can't be written now comes with a later report."""
        self.patience.attempt("metrics", lambda: self._metrics.write(report))
        self._unshown.append(report)
        self.patience.attempt("TensorBoard's file", self._show_reports)

    def _show_reports(self) -> None:
        while self._unshown:
            self._board.write(self._unshown[0])
            del self._unshown[0]

    def show(self, write: Callable[[TensorBoard], None]) -> None:
        """Something else into TensorBoard; it is left out where that can't be written now."""
        self.patience.attempt("TensorBoard's file", lambda: write(self._board))

    def due(self) -> bool:
        """Whether the clock asks for a checkpoint: the last is long ago, or could not be written a while ago."""
        if self._missed:
            return monotonic() - self._tried_at >= RETRY_SECONDS
        return self._minutes is not None and monotonic() - self._saved_at >= 60 * self._minutes

    def checkpoint(self, iteration: int, tree: dict[str, Any]) -> bool:
        """Write the checkpoint of ``iteration`` and delete those that retention no longer keeps; whether it worked."""

        def write() -> None:
            self._metrics.sync()
            save_checkpoint(self.run.checkpoint(iteration), tree)
            self.run.prune(self._keep)

        self._tried_at = monotonic()
        self._missed = not self.patience.attempt("checkpoints", write)
        if not self._missed:
            self.saved, self._saved_at = iteration, self._tried_at
        return not self._missed

    def best(self, tree: dict[str, Any]) -> bool:
        """Write ``best.pt``; whether it worked."""
        return self.patience.attempt("best.pt", lambda: save_checkpoint(self.run.best, tree))

    def last(self, iteration: int, tree: dict[str, Any]) -> None:
        """Write the checkpoint of a finished run, trying until it works.

        Raises:
            UnwritableError: it did not work for as long as the patience lasts.
        """
        while not self.checkpoint(iteration, tree):
            for note in self.patience.notes:  # no report will carry them while this waits
                warnings.warn(note, stacklevel=2)
            self.patience.notes.clear()
            sleep(min(RETRY_SECONDS, 1.0))

    def close(self) -> None:
        """Flush the metrics and give the folder free. May be called again."""
        self._metrics.close()
        self._board.close()
        self._lock.release()
