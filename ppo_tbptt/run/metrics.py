"""Reports, and ``metrics.jsonl`` with one JSON object per iteration."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ppo_tbptt.run.files import AppendFile, parse_json, write_text
from ppo_tbptt.runtime.errors import InputError

MAX_LINE_BYTES = 2**20


class MetricsError(InputError):
    """Names the file, the line and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of one iteration, for console, metrics and TensorBoard alike.

    ``scalars`` are keyed by TensorBoard tag; a tag without data in this iteration is absent, never NaN. All figures
    that depend on the clock are in ``time/*``. ``notes`` are lines for the user, such as faults.
    """

    iteration: int
    env_steps: int
    scalars: dict[str, float]
    notes: tuple[str, ...] = ()

    def row(self) -> dict[str, float]:
        """Return the row of ``metrics.jsonl``."""
        return {"iteration": self.iteration, "env_steps": self.env_steps, **self.scalars}


class MetricsWriter(AppendFile):
    """Appends reports to ``metrics.jsonl`` in ``folder``; rows after iteration ``resume_from`` are removed first."""

    def __init__(self, folder: Path, *, resume_from: int | None = None) -> None:
        path = folder / "metrics.jsonl"
        if path.is_symlink():
            raise MetricsError(f"{path}: is a link; must be a file, as what is written must stay in the run")
        if resume_from is not None and path.exists():
            kept = [row for row in read_metrics(path) if row["iteration"] <= resume_from]
            write_text(path, "".join(_line(row) for row in kept))
        path.touch()
        super().__init__(path)

    def write(self, report: Report) -> None:
        """Append a row. Raises like `append`."""
        self.append(_line(report.row()).encode())


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.jsonl``; a torn last line (of a killed run) is left out.

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
                if len(line) > MAX_LINE_BYTES:
                    wrong = wrong or f"{path}:{len(rows) + 1}: more than {MAX_LINE_BYTES:,} bytes; must be one row"
                if wrong:
                    raise MetricsError(wrong)
                try:
                    rows.append(_row(line))
                except ValueError as error:
                    wrong = f"{path}:{len(rows) + 1}: {error}"
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read: {error.strerror}") from None
    return rows


def _row(line: bytes) -> dict[str, float]:
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
