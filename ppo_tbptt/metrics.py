"""Where a run's numbers go: one object per iteration in ``metrics.jsonl``, and the same tags in TensorBoard."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ppo_tbptt.files import write_text


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

    def image(self, tag: str, encoded: bytes, size: tuple[int, int], env_steps: int) -> None:
        """An encoded picture of ``(height, width)`` for TensorBoard's image tab, which also plays animated GIFs."""
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        picture = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=encoded)
        summary = Summary(value=[Summary.Value(tag=tag, image=picture)])
        assert self._writer.file_writer is not None
        self._writer.file_writer.add_summary(summary, env_steps)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a ``metrics.jsonl``; a torn last line (of a killed run) is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, float]) -> str:
    finite = {key: value for key, value in row.items() if math.isfinite(value)}
    return json.dumps(finite) + "\n"
