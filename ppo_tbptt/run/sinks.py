"""All writes of a trainer into its run folder, tolerant of a disk that is full for a while."""

import warnings
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.run.checkpoint import save_checkpoint
from ppo_tbptt.run.files import write_text
from ppo_tbptt.run.folder import RunDir, RunLock, reporting
from ppo_tbptt.run.metrics import MetricsWriter, Report
from ppo_tbptt.run.tensorboard import TensorBoard
from ppo_tbptt.runtime.device import versions
from ppo_tbptt.runtime.errors import RunError


class UnwritableError(RunError):
    """One line: what could not be written, for how long, and why."""


class WriteGuard:
    """Tolerates failing writes for up to ``minutes``.

    Attributes:
        notes: lines for the user, one when writes begin to fail and one when they work again; the caller clears them.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = monotonic) -> None:
        self._minutes, self._clock = minutes, clock
        self._since: dict[str, float] = {}
        self.notes: list[str] = []

    def try_write(self, name: str, write: Callable[[], None]) -> bool:
        """Call ``write``, which writes what ``name`` says, and return whether it succeeded.

        Raises:
            UnwritableError: writes of ``name`` have failed for ``minutes``.
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
"""Seconds between attempts to write a checkpoint."""


class RunWriter:
    """Writes config, metrics, TensorBoard and checkpoints of a run, and holds the run folder's lock until closed.

    Attributes:
        run: the run folder.
        saved: iteration of the newest checkpoint; None where there is none.
    """

    def __init__(self, path: Path, config: Config, *, resumed_from: int | None = None, env_steps: int = 0) -> None:
        """Create the run folder, or open that of a run resumed after iteration ``resumed_from`` and ``env_steps``.

        Raises:
            RunDirError: the folder exists (new run) or is missing (resumed run), can't be written, or is locked.
        """
        self.run = RunDir.create(path) if resumed_from is None else RunDir.open(path)
        self._lock = RunLock(path)
        try:
            with reporting(path, "write in this run folder"):
                self.run.remove_temporary_files()
                write_text(self.run.config, config.to_toml())
                self._metrics = MetricsWriter(path, resume_from=resumed_from)
                self._board = TensorBoard(path, after=None if resumed_from is None else env_steps)
        except BaseException:
            self._lock.release()
            raise
        self._train = config.train
        self._guard = WriteGuard(config.train.max_unwritable_minutes)
        self.saved = resumed_from
        self._saved_at = self._tried_at = monotonic()
        self._last_failed = False  # writing the last checkpoint

    def write_run_info(self, spec: EnvSpec, config: Config, device: torch.device, env_steps: int) -> None:
        """Write the layout of charts, the config and the versions to TensorBoard."""

        def write(board: TensorBoard) -> None:
            board.layout(spec.headline, env_steps, held_out=config.train.eval_every > 0)
            board.text("config", config.to_toml(), env_steps)
            board.text("versions", versions(device), env_steps)

        self.write_tensorboard(write)

    def take_notes(self) -> list[str]:
        """Return the lines for the user and clear them."""
        taken, self._guard.notes = self._guard.notes, []
        return taken

    def report(self, report: Report) -> None:
        """Write a report to the metrics and TensorBoard."""
        self._guard.try_write("metrics", lambda: self._metrics.write(report))
        self.write_tensorboard(lambda board: board.write(report))

    def write_tensorboard(self, write: Callable[[TensorBoard], None]) -> None:
        """Call ``write`` with the TensorBoard writer."""
        self._guard.try_write("TensorBoard's file", lambda: write(self._board))

    def checkpoint_due(self) -> bool:
        """Return whether ``train.checkpoint_minutes`` are over, or a failed checkpoint is to be retried."""
        if self._last_failed:
            return monotonic() - self._tried_at >= RETRY_SECONDS
        minutes = self._train.checkpoint_minutes
        return minutes is not None and monotonic() - self._saved_at >= 60 * minutes

    def save(self, iteration: int, tree: dict[str, Any]) -> bool:
        """Write the checkpoint of ``iteration``, delete the oldest ones, and return whether that succeeded."""

        def write() -> None:
            self._metrics.sync()
            save_checkpoint(self.run.checkpoint(iteration), tree)
            self.run.prune(self._train.keep_checkpoints)

        self._tried_at = monotonic()
        self._last_failed = not self._guard.try_write("checkpoints", write)
        if not self._last_failed:
            self.saved, self._saved_at = iteration, self._tried_at
        return not self._last_failed

    def save_best(self, tree: dict[str, Any]) -> bool:
        """Write ``best.pt`` and return whether that succeeded."""
        return self._guard.try_write("best.pt", lambda: save_checkpoint(self.run.best, tree))

    def save_final(self, iteration: int, tree: dict[str, Any]) -> None:
        """Write the checkpoint of a finished run, and retry until it succeeds.

        Raises:
            UnwritableError: it failed for ``train.max_unwritable_minutes``.
        """
        while not self.save(iteration, tree):
            for note in self.take_notes():  # no report follows that could contain them
                warnings.warn(note, stacklevel=2)
            sleep(min(RETRY_SECONDS, 1.0))

    def close(self) -> None:
        """Write what is pending where that is possible, and release the lock. May be called again."""
        self._metrics.close()
        self._board.close()
        self._lock.release()
