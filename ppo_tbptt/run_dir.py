"""The layout of a run's folder, and which checkpoint a path stands for."""

import re
from pathlib import Path

from ppo_tbptt.checkpoint import CheckpointError


class RunDirError(ValueError):
    """One line that names the folder and what is wrong with it."""


class RunDir:
    """``config.toml``, ``checkpoints/``, ``metrics.jsonl``, TensorBoard event files, ``evaluations/``, ``videos/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.evaluations = path / "evaluations"
        self.best = self.checkpoints / "best.pt"

    @classmethod
    def create(cls, path: Path) -> "RunDir":
        """Make a new run folder.

        Raises:
            RunDirError: it exists and is not empty (nothing is ever overwritten), or can't be made.
        """
        run = cls(path)
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
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
            path.unlink()

    def newest(self) -> Path:
        """Raises:
        CheckpointError: there is none yet.
        """
        periodic = self.periodic()
        if not periodic:
            raise CheckpointError(f"{self.path}: no checkpoint in this run yet")
        return periodic[-1]


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint file that ``path`` (a run's folder, or a checkpoint) stands for: of a run, the newest.

    Raises:
        CheckpointError, RunDirError: there is none.
    """
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if is_folder:
        return RunDir.open(path).newest()
    if not exists:
        raise CheckpointError(f"{path}: no such run folder or checkpoint")
    return path
