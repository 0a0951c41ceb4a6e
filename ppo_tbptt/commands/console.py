"""What a person sees while training: a live display in a terminal, plain lines otherwise."""

from collections.abc import Mapping
from time import monotonic
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.statistics import Estimate
from ppo_tbptt.run.metrics import Report

PLAIN_SECONDS = 5.0
"""Plain lines are at least this far apart, but for the first, the last and those with an evaluation."""


COLUMNS = 100
"""What a plain line has room for."""


class Display:
    """Shows reports as they come; a context manager."""

    def __init__(self, config: Config, console: Console, *, batch_size: int, num_iterations: int) -> None:
        self._config = config
        self._batch_size = batch_size  # over all ranks, as num_iterations
        self._num_iterations = num_iterations
        self._console = console
        self._began = monotonic()
        self._first_step: int | None = None
        self._last_line = float("-inf")
        self._known: dict[str, float] = {}  # the newest figure of each tag, for iterations without one
        self._progress = Progress(
            TextColumn("{task.fields[steps]} steps"),
            BarColumn(),
            TextColumn("{task.fields[left]} left"),
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=config.total_steps, steps="0", left="?")
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def update(self, report: Report) -> None:
        for note in report.notes:
            self._console.print(note, highlight=False, soft_wrap=True)
        fresh = report.scalars
        self._known |= fresh
        left = self._left(report)
        if self._live is not None:
            steps = f"{report.env_steps:,} / {self._config.total_steps:,}"
            self._progress.update(self._task, completed=report.env_steps, steps=steps, left=left)
            self._live.update(Group(self._progress, self._table(report)))
            return
        last = report.iteration >= self._num_iterations
        due = monotonic() - self._last_line >= PLAIN_SECONDS
        if due or last or report.iteration == 1 or any(tag.startswith("eval/") for tag in fresh):
            self._last_line = monotonic()
            self._console.print(self._line(report, left), highlight=False, soft_wrap=True)

    def _left(self, report: Report) -> str:
        if self._first_step is None:
            self._first_step = report.env_steps - self._batch_size
        rate = (report.env_steps - self._first_step) / (monotonic() - self._began)
        return duration(max(0, self._config.total_steps - report.env_steps) / rate)

    def _line(self, report: Report, left: str) -> str:
        parts = [
            f"{report.env_steps:>11,}/{self._config.total_steps:,}",
            f"{report.scalars['time/steps_per_second']:,.0f} steps/s",
            f"{left} left",
        ]
        evaluated = {tag: value for tag, value in report.scalars.items() if tag.startswith("eval/")}
        general = ("eval/return", "eval/length")  # the task's own measures come first
        parts += [f"{tag} {evaluated[tag]:.3f}" for tag in sorted(evaluated, key=general.__contains__)]
        parts += [f"{name} {self._known[tag]:.3f}" for tag, name in _SHOWN.items() if tag in self._known]
        line = parts.pop(0)
        for part in parts:  # as many as fit; the first matter most
            line += f"  {part}" if len(line) + 2 + len(part) <= COLUMNS else ""
        return line

    def _table(self, report: Report) -> Table:
        groups: dict[str, list[str]] = {}
        for tag, value in self._known.items():
            group, name = tag.split("/", 1)
            groups.setdefault(group, []).append(f"{escape(name)} [bold]{value:.4g}[/]")
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("iteration", Text.from_markup(f"[bold]{report.iteration:,}[/] of {self._num_iterations:,}"))
        for group in ("episode", "env", "eval", "loss", "policy", "optim", "sequences", "faults", "time"):
            if group in groups:
                table.add_row(group, Text.from_markup("  ".join(groups[group])))
        return table

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, traceback)


_SHOWN = {
    "episode/return": "return",
    "episode/length": "length",
    "episode/success": "success",
    "episode/commands_completed": "commands",
    "episode/tiles_visited": "tiles",
    "episode/coins_collected": "coins",
    "policy/entropy": "entropy",
    "loss/policy": "policy loss",
    "loss/value": "value loss",
}


def duration(seconds: float) -> str:
    """``1:02:03``, ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def measures_table(measures: Mapping[str, Estimate]) -> Table:
    """Measures as rows: name, mean and 95 % interval."""
    table = Table(box=None, padding=(0, 2))
    table.add_column("measure")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, e in measures.items():
        interval = "-" if e.ci95 is None else f"{e.ci95[0]:.3f} to {e.ci95[1]:.3f}"
        table.add_row(name, f"{e.mean:.3f}", interval)
    return table
