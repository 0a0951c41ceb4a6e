"""Where a run's numbers go: one object per iteration in ``metrics.jsonl``, and the same tags in TensorBoard."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ppo_tbptt.files import write_text
from ppo_tbptt.json_files import parse_json

MAX_LINE_BYTES = 2**20


class MetricsError(ValueError):
    """One line that names the file, the line and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one iteration; the only source of every scalar on the console, in files and in tests.

    ``scalars`` are by TensorBoard tag; a tag without data in this iteration is absent, never NaN. Everything that
    depends on the clock is under ``time/``.
    """

    iteration: int
    env_steps: int
    scalars: dict[str, float]

    def row(self) -> dict[str, float]:
        return {"iteration": self.iteration, "env_steps": self.env_steps, **self.scalars}


class MetricsWriter:
    """Appends reports to ``metrics.jsonl`` and to TensorBoard event files in ``folder``; x is environment steps.

    ``resume_from`` is the iteration to go on from: rows after it are cut off, and TensorBoard is told to hide its
    points from there on.
    """

    def __init__(self, folder: Path, *, resume_from: int | None = None) -> None:
        self._path = folder / "metrics.jsonl"
        from torch.utils.tensorboard import SummaryWriter  # here, because it is slow to import

        purge = None
        if self._path.is_symlink():
            raise MetricsError(f"{self._path}: is a link; must be a file, as what is written must stay in the run")
        if resume_from is not None and self._path.exists():
            kept = [row for row in read_metrics(self._path) if row["iteration"] <= resume_from]
            text = "".join(_line(row) for row in kept)
            write_text(self._path, text)
            purge = int(kept[-1]["env_steps"]) + 1 if kept else 0
        self._file = self._path.open("a", encoding="utf-8")
        self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=30)

    def write(self, report: Report) -> None:
        self._file.write(_line(report.row()))
        self._file.flush()
        for tag, value in report.scalars.items():
            self._writer.add_scalar(tag, value, report.env_steps)

    def text(self, tag: str, text: str, env_steps: int = 0) -> None:
        """A text for TensorBoard's text tab, shown as written."""
        self._writer.add_text(tag, "\n".join("    " + line for line in text.splitlines()), env_steps)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``; a torn last line (of a killed run) is left out.

    Raises:
        MetricsError: missing, unreadable, or a line that is no row stands before the last.
    """
    rows: list[dict[str, float]] = []
    wrong = ""
    try:
        if not path.is_file():  # a pipe would never end
            raise MetricsError(f"{path}: no such metrics file")
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                if wrong:
                    raise MetricsError(wrong)
                try:
                    rows.append(_row(line))
                except ValueError as error:
                    wrong = f"{path}:{len(rows) + 1}: {error}"
                    if len(line) > MAX_LINE_BYTES:
                        raise MetricsError(wrong) from None
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read: {error.strerror}") from None
    return rows


def _row(line: bytes) -> dict[str, float]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"a line of more than {MAX_LINE_BYTES:,} bytes; must be the figures of one iteration")
    row = parse_json(line)
    for key in ("iteration", "env_steps"):
        if type(row.get(key)) is not int or row[key] < 0:
            raise ValueError(f"{key} is missing or no count; must be a whole number")
    for key, value in row.items():
        if type(value) not in (int, float):
            raise ValueError(f"{key[:80]!r} is a {type(value).__name__}; must be a number")
    return row


def _line(row: dict[str, float]) -> str:
    finite = {key: value for key, value in row.items() if math.isfinite(value)}
    return json.dumps(finite) + "\n"
