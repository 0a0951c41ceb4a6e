"""The run folder: its layout, its checkpoints and its lock."""

import fcntl
import os
import re
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppo_tbptt.run.checkpoint import CheckpointError, load_verified, verify_checkpoint
from ppo_tbptt.runtime.errors import InputError


class RunDirError(InputError):
    """One line that names the folder and its fault."""


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
        try:
            if path.exists() and (not path.is_dir() or any(entry.name != LOCK_FILE for entry in path.iterdir())):
                raise RunDirError(
                    f"{path}: exists already; choose another --run-dir, or go on with it: --resume {path}"
                )
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"{path}: can't make this run folder ({error.strerror})") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """Open an existing run folder.

        Raises:
            RunDirError: ``path`` is not a run folder, or can't be read.
        """
        run = cls(path)
        try:
            is_run = run.config.is_file()
        except OSError as error:
            raise RunDirError(f"{path}: can't read this run folder ({error.strerror})") from error
        if not is_run:
            raise RunDirError(f"{path}: not a run folder (it has no config.toml)")
        return run

    def checkpoint(self, iteration: int) -> Path:
        """Return the path of an iteration's periodic checkpoint."""
        return self.checkpoints / f"iteration_{iteration:07d}.pt"

    def periodic(self) -> list[Path]:
        """List the periodic checkpoints, oldest first."""
        found = {path: re.fullmatch(r"iteration_(\d{7,})\.pt", path.name, re.ASCII) for path in self._entries()}
        numbers = {path: int(name[1]) for path, name in found.items() if name and path.is_file()}
        return sorted(numbers, key=lambda path: numbers[path])

    def _entries(self) -> list[Path]:
        return list(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []

    def prune(self, keep: int) -> None:
        """Delete all periodic checkpoints except for the newest ``keep``."""
        for path in self.periodic()[:-keep]:
            path.unlink(missing_ok=True)

    def newest(self) -> Path:
        """Find the newest valid checkpoint, ``best.pt`` last, and warn about each newer one that is damaged.

        Raises:
            CheckpointError: there is no checkpoint, or none is valid.
        """
        paths = self.periodic()[::-1]
        if not paths:
            raise CheckpointError(f"{self.path}: no checkpoint in this run yet")
        refused: list[CheckpointError] = []
        for path in [*paths, *([self.best] if self.best.is_file() else [])]:
            try:
                verify_checkpoint(path)
            except CheckpointError as error:
                refused.append(error)
                continue
            for error in refused:
                warnings.warn(f"{error}; {path.name} is used instead", stacklevel=2)
            return path
        raise CheckpointError(
            f"{self.path}: none of its {len(refused)} checkpoints can be used; the newest: {refused[0]}"
        )

    def load_newest(self) -> tuple[Path, dict[str, Any]]:
        """Load the `newest` checkpoint. Return its path and its tree.

        Raises:
            CheckpointError: there is no checkpoint, or none is valid.
        """
        path = self.newest()
        return path, load_verified(path)


LOCK_FILE = ".lock"


class RunLock:
    """The run folder's lock. One process holds it at a time, and the system releases it when the process ends."""

    def __init__(self, path: Path) -> None:
        """Acquire the run folder's lock.

        Raises:
            RunDirError: another process holds it, or the folder can't be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / LOCK_FILE).open("ab+", buffering=0)
        except OSError as error:
            raise RunDirError(f"{path}: can't write in this run folder ({error.strerror})") from error
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


def remove_temporary_files(run: RunDir) -> None:
    """Delete the temporary files of a killed process. The caller must hold the lock."""
    for folder in (run.path, run.checkpoints, run.evaluations, run.videos):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def resolve_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a file, or the newest valid checkpoint if it is a run folder.

    Raises:
        CheckpointError, RunDirError: there is no such file, run folder or checkpoint.
    """
    run = run_at(path)
    return path if run is None else run.newest()


def run_at(path: Path) -> RunDir | None:
    """Return the run in the folder ``path``, or None if ``path`` is a file, such as a checkpoint.

    Raises:
        CheckpointError, RunDirError: ``path`` does not exist, can't be read, or is a folder without a run.
    """
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if is_folder:
        return RunDir.open(path)
    if not exists:
        raise CheckpointError(f"{path}: no such run folder or checkpoint")
    return None
