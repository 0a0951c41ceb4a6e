"""The layout of a run's folder, which checkpoint a path stands for, and who may write there."""

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
    """One line that names the folder and what is wrong with it."""


class RunDir:
    """``config.toml``, ``checkpoints/``, ``metrics.jsonl``, TensorBoard event files, ``evaluations/``, ``videos/``."""

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
        """Make a new run folder.

        Raises:
            RunDirError: it exists and is not empty (nothing is ever overwritten), or can't be made.
        """
        run = cls(path)
        try:
            if path.exists() and (not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir())):
                raise RunDirError(
                    f"{path}: exists already; choose another --run-dir, or go on with it: --resume {path}"
                )
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunDirError(f"{path}: can't make this run folder ({error.strerror})") from error
        return run

    @classmethod
    def open(cls, path: Path) -> "RunDir":
        """An existing run folder.

        Raises:
            RunDirError: there is none.
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
        return self.checkpoints / f"iteration_{iteration:07d}.pt"

    def periodic(self) -> list[Path]:
        """The periodic checkpoints, oldest first; other files and folders that lie there are not touched."""
        found = {path: re.fullmatch(r"iteration_(\d{7,})\.pt", path.name, re.ASCII) for path in self._entries()}
        numbers = {path: int(name[1]) for path, name in found.items() if name and path.is_file()}
        return sorted(numbers, key=lambda path: numbers[path])

    def _entries(self) -> list[Path]:
        return list(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []

    def prune(self, keep: int) -> None:
        """Delete all periodic checkpoints but the newest ``keep``."""
        for path in self.periodic()[:-keep]:
            path.unlink(missing_ok=True)

    def newest(self) -> Path:
        """The newest whole checkpoint. Warns of each newer one that is damaged.

        Raises:
            CheckpointError: there is none yet, or none is whole.
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
        """`newest`, and what is in it.

        Raises:
            CheckpointError: there is none yet, or none is whole; or what is in it is no checkpoint of this package.
        """
        path = self.newest()
        return path, load_verified(path)


LOCK = ".lock"


class RunLock:
    """The right to write in a run's folder, for one process at a time; it ends with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        """Take it.

        Raises:
            RunDirError: another process has it, or the folder can't be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / LOCK).open("ab+", buffering=0)
        except OSError as error:
            raise RunDirError(f"{path}: can't write in this run folder ({error.strerror})") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            owner = self._file.read(100).decode("ascii", "replace") or "of unknown number"
            self._file.close()
            raise RunDirError(f"{path}: another training (process {owner}) is writing there") from None
        with suppress(OSError):  # only what the message above says
            self._file.truncate(0)
            self._file.write(str(os.getpid()).encode())

    def release(self) -> None:
        """Give it back. Harmless when repeated."""
        self._file.close()


def remove_leftovers(run: RunDir) -> None:
    """Delete half-written files of a killed process. Only with the lock."""
    for folder in (run.path, run.checkpoints, run.evaluations, run.videos):
        for path in folder.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint file that ``path`` (a run's folder, or a checkpoint) stands for: of a run, the newest whole one.

    Raises:
        CheckpointError, RunDirError: there is none.
    """
    run = run_at(path)
    return path if run is None else run.newest()


def run_at(path: Path) -> RunDir | None:
    """The run whose folder ``path`` is; None where it is a file, such as a checkpoint.

    Raises:
        CheckpointError, RunDirError: there is nothing, or a folder that is no run's.
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
