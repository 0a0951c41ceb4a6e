"""The run folder: its layout, its checkpoints and its lock."""

import fcntl
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ppo_tbptt.run.agents import nearest_agents
from ppo_tbptt.run.checkpoint import CheckpointError, load_verified, verify_checkpoint
from ppo_tbptt.runtime.errors import InputError

LOCK_FILE = ".lock"


class RunDirError(InputError):
    """One line that names the folder and its fault."""


@contextmanager
def reporting(path: Path, doing: str) -> Iterator[None]:
    """Raise an ``OSError`` as a `RunDirError` of the run folder ``path``."""
    try:
        yield
    except OSError as error:
        raise RunDirError(f"{path}: can't {doing} ({error.strerror})") from error


class RunDir:
    """A run folder: its paths and its checkpoints. TensorBoard event files lie beside ``config.toml``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "evaluations"
        self.videos = path / "videos"
        self.best = self.checkpoints / "best.pt"

    @classmethod
    def create(cls, path: Path) -> "RunDir":
        """Create a new run folder.

        Raises:
            RunDirError: it exists and is not empty, or can't be created.
        """
        run = cls(path)
        with reporting(path, "make this run folder"):
            if path.exists() and (not path.is_dir() or any(entry.name != LOCK_FILE for entry in path.iterdir())):
                remedy = f"choose another --run-dir, or go on with it: --resume {path}"
                raise RunDirError(f"{path}: exists already; {remedy}")
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Open an existing run folder.

        Raises:
            RunDirError: ``path`` is not a run folder, or can't be read.
        """
        run = cls(path)
        with reporting(path, "read this run folder"):
            if not run.config.is_file():
                raise RunDirError(f"{path}: not a run folder (it has no config.toml)")
        return run

    def checkpoint(self, iteration: int) -> Path:
        """Return the path of an iteration's periodic checkpoint."""
        return self.checkpoints / f"iteration_{iteration:07d}.pt"

    def periodic(self) -> list[Path]:
        """List the periodic checkpoints, oldest first."""
        entries = list(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []
        names = [(re.fullmatch(r"iteration_(\d{7,})\.pt", path.name, re.ASCII), path) for path in entries]
        return [path for _, path in sorted((int(name[1]), path) for name, path in names if name and path.is_file())]

    def prune(self, keep: int) -> None:
        """Delete all periodic checkpoints except for the newest ``keep``."""
        for path in self.periodic()[:-keep]:
            path.unlink(missing_ok=True)

    def remove_temporary_files(self) -> None:
        """Delete the temporary files of a killed process. The caller must hold the lock."""
        for folder in (self.path, self.checkpoints, self.evaluations, self.videos):
            for path in folder.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def newest(self) -> Path:
        """Find the newest valid checkpoint, ``best.pt`` last, and warn about each newer one that is damaged.

        Raises:
            CheckpointError: there is no checkpoint, or none is valid.
        """
        paths = self.periodic()[::-1]
        if not paths:
            raise CheckpointError(f"{self.path}: no checkpoint in this run yet")
        if self.best.is_file():
            paths.append(self.best)
        refused: list[CheckpointError] = []
        for path in paths:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                refused.append(error)
            else:
                for error in refused:
                    warnings.warn(f"{error}; {path.name} is used instead", stacklevel=2)
                return path
        raise CheckpointError(
            f"{self.path}: none of its {len(paths)} checkpoints can be used; the newest: {refused[0]}"
        )

    def load_newest(self) -> tuple[Path, dict[str, Any]]:
        """Load the `newest` checkpoint, and return its path and its tree. Raises like `newest`."""
        path = self.newest()
        return path, load_verified(path)


class RunLock:
    """The run folder's lock. One process holds it at a time, and the system releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        """Acquire the run folder's lock.

        Raises:
            RunDirError: another process holds it, or the folder can't be written.
        """
        with reporting(path, "write in this run folder"):
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / LOCK_FILE).open("ab+", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read(100).decode("ascii", "replace") or "of unknown number"
            self._file.close()
            raise RunDirError(f"{path}: another training (process {owner}) is writing there") from None
        with suppress(OSError):  # the process number only serves the message above
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())

    def release(self) -> None:
        """Release the lock. May be called again."""
        self._file.close()


def run_at(path: Path) -> RunDir | None:
    """Return the run in the folder ``path``, or None if ``path`` is a file, such as a checkpoint.

    Raises:
        CheckpointError, RunDirError: ``path`` does not exist, can't be read, or is a folder without a run.
    """
    with reporting(path, "be read"):
        if path.is_dir():
            return RunDir.open(path)
        if not path.exists():
            raise CheckpointError(f"{path}: no such run folder, checkpoint or agent; {nearest_agents(str(path))}")
    return None
