"""Console output: lines, figures, and the display of a training."""

from collections.abc import Sequence
from contextlib import nullcontext
from time import monotonic

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ppo_tbptt.run.metrics import Report

PLAIN_SECONDS = 5.0
"""Smallest interval between plain lines, except the first, the last and those with an evaluation."""
PLAIN_COLUMNS = 100
"""Width of a plain line, and of tables without a terminal."""
PLAIN_SCALARS = {
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
"""Scalars of a plain line and their names there, the most important first."""


def say(console: Console, text: str) -> None:
    """Print lines as they are, without markup, highlighting or wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def wide_console() -> Console:
    """Make a console for tables: as wide as the terminal, 100 columns without one (rich's default is 80)."""
    width = None if Console().is_terminal else PLAIN_COLUMNS
    return Console(width=width, markup=False, emoji=False)


def figure(value: float) -> str:
    """Format a measure: ``0.951``, ``10.2``."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval(mean: float, ci95: Sequence[float] | None) -> str:
    """Format a mean and its 95 % interval: ``0.951 [0.900, 0.990]``."""
    return figure(mean) if ci95 is None else f"{figure(mean)} [{figure(ci95[0])}, {figure(ci95[1])}]"


class Display:
    """Display of the newest report: plain lines from time to time, or in a terminal, and while entered, ``live``.

    ``total_steps`` and ``num_iterations`` are those of the whole run, ``batch_size`` is that of all ranks.
    """

    def __init__(self, total_steps: int, console: Console, *, batch_size: int, num_iterations: int) -> None:
        self._total_steps = total_steps
        self._batch_size = batch_size
        self._num_iterations = num_iterations
        self._console = console
        self._began = monotonic()
        self._first_step: int | None = None
        self._last_line = float("-inf")
        self._known: dict[str, float] = {}  # the newest figure of each tag
        steps, left = TextColumn("{task.fields[steps]} steps"), TextColumn("{task.fields[left]} left")
        self._progress = Progress(steps, BarColumn(), left, auto_refresh=False)
        self._task = self._progress.add_task("", total=total_steps, steps="0", left="?")
        self.live = Live(console=console, refresh_per_second=4) if console.is_terminal else nullcontext()

    def update(self, report: Report) -> None:
        """Show a report."""
        for note in report.notes:
            say(self._console, note)
        self._known |= report.scalars
        left = self._left(report)
        if isinstance(self.live, Live):
            steps = f"{report.env_steps:,} / {self._total_steps:,}"
            self._progress.update(self._task, completed=report.env_steps, steps=steps, left=left)
            self.live.update(Group(self._progress, self._table(report)))
            return
        due = monotonic() - self._last_line >= PLAIN_SECONDS or report.iteration in (1, self._num_iterations)
        if due or any(tag.startswith("eval/") for tag in report.scalars):
            self._last_line = monotonic()
            say(self._console, self._line(report, left))

    def _left(self, report: Report) -> str:
        if self._first_step is None:
            self._first_step = report.env_steps - self._batch_size
        rate = (report.env_steps - self._first_step) / (monotonic() - self._began)
        minutes, seconds = divmod(round(max(0, self._total_steps - report.env_steps) / rate), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    def _line(self, report: Report, left: str) -> str:
        parts = [
            f"{report.env_steps:>11,}/{self._total_steps:,}",
            f"{report.scalars['time/steps_per_second']:,.0f} steps/s",
            f"{left} left",
        ]
        evaluated = {tag: value for tag, value in report.scalars.items() if tag.startswith("eval/")}
        general = ("eval/return", "eval/length")  # the task's own measures come first
        parts += [f"{tag} {evaluated[tag]:.3f}" for tag in sorted(evaluated, key=general.__contains__)]
        parts += [f"{name} {self._known[tag]:.3f}" for tag, name in PLAIN_SCALARS.items() if tag in self._known]
        line = parts.pop(0)
        for part in parts:  # as many as fit
            line += f"  {part}" if len(line) + 2 + len(part) <= PLAIN_COLUMNS else ""
        return line

    def _table(self, report: Report) -> Table:
        groups: dict[str, list[str]] = {}
        for tag, value in self._known.items():
            group, name = tag.split("/", 1)
            groups.setdefault(group, []).append(f"{escape(name)} [bold]{value:.4g}[/]")
        table = Table(show_header=False, box=None, padding=(0, 1))
        table.add_row("iteration", Text.from_markup(f"[bold]{report.iteration:,}[/] of {self._num_iterations:,}"))
        for group in ("episode", "env", "curriculum", "eval", "loss", "policy", "optim", "sequences", "faults", "time"):
            if group in groups:
                table.add_row(group, Text.from_markup("  ".join(groups[group])))
        return table
