"""``compare``: print the results of runs side by side, by task and config."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_tbptt.analysis.groups import (
    FRACTIONS,
    Group,
    Reach,
    Summary,
    by_task,
    differences,
    goal,
    group_runs,
    reach,
    task_titles,
)
from ppo_tbptt.analysis.runs import read_runs
from ppo_tbptt.commands.console import figure, interval, say, wide_console
from ppo_tbptt.commands.parser import RUN_HELP, Parser, check_target
from ppo_tbptt.commands.results import write_json


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "compare", "Runs side by side: held-out results, steps and hours to get there, what they differ in."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN_HELP)
    parser.option("--json", type=Path, metavar="FILE", help="write the same data there")
    args = parser.parse_args(argv)
    check_target("--json", args.json)
    groups = group_runs(read_runs(args.runs))
    tasks = by_task(groups)
    reaches = {
        group.letter: [reach(group, fraction, target) for fraction in FRACTIONS]
        for members in tasks
        if (target := goal(members)) is not None
        for group in members
    }
    console = wide_console()
    narrow = console.width < 100
    for members, title in zip(tasks, task_titles(tasks), strict=True):
        first = members[0].runs[0]
        at_most = "" if first.headline_max is None else f" (at most {first.headline_max:g})"
        console.print(f"\n{title}", style="bold", highlight=False, markup=False)
        say(console, f"{first.headline} on held-out levels{at_most}")
        console.print(_results(members, narrow))
        if members[0].letter in reaches:
            console.print(_reached(members, reaches, narrow))
    _print_notes(groups, reaches, console)
    _print_differences(groups, console)
    if args.json is not None:
        trees = [_tree(group, reaches.get(group.letter, [])) for members in tasks for group in members]
        write_json(args.json, {"groups": trees, "differences": differences(groups)})
        say(console, f"written to {args.json}")
    return 0


def _results(groups: Sequence[Group], narrow: bool) -> Table:
    table = _table("", "run", "runs", "steps", "hours", "steps/s", "best [95 %]", "last [95 %]", "IQM", narrow=narrow)
    for group in groups:
        last = group.last
        steps = [_short(end(run.env_steps for run in group.runs)) for end in (min, max)]
        speeds = [run.steps_per_second for run in group.runs if run.steps_per_second is not None]
        table.add_row(
            group.letter,
            group.name,
            str(len(group.runs)),
            steps[0] if steps[0] == steps[1] else " - ".join(steps),
            _hours(median(run.hours for run in group.runs)),
            _short(median(speeds)) if speeds else "-",
            _summary(group.best),
            _summary(last),
            "-" if last is None or last.iqm is None else figure(last.iqm.mean),
        )
    return table


def _reached(groups: Sequence[Group], reaches: Mapping[str, Sequence[Reach]], narrow: bool) -> Table:
    goals = [f"{result.fraction * 100:g} % ({result.value:.3g})" for result in reaches[groups[0].letter]]
    table = _table("", "steps and hours to reach", *goals, narrow=narrow)
    for group in groups:
        table.add_row(group.letter, group.name, *(_reach(r, len(group.runs)) for r in reaches[group.letter]))
    return table


def _table(*columns: str, narrow: bool) -> Table:
    """Make a table whose names are folded, and whose intervals wrap in a narrow terminal."""
    table = Table(box=None, padding=(0, 1))
    for number, name in enumerate(columns):
        if number < 2:
            table.add_column(name, overflow="fold", min_width=12 if number else None)
        else:
            table.add_column(name, justify="right", no_wrap=not narrow or "[" not in name)
    return table


def _summary(summary: Summary | None) -> str:
    return "-" if summary is None else interval(summary.mean, summary.ci95)


def _reach(result: Reach, runs: int) -> str:
    share = "" if result.runs in (0, runs) else f" ({result.runs} of {runs} runs)"
    if result.env_steps is None or result.hours is None:
        return f"-{share}"
    bound = "≤ " if result.at_the_latest else ""
    return f"{bound}{_short(result.env_steps)}, {_hours(result.hours)} h{share}"


def _short(number: float) -> str:
    """Format a count: ``840``, ``61.4k``, ``1.2M``."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 10 else f"{hours:.2g}"


def _print_notes(groups: Sequence[Group], reaches: Mapping[str, Sequence[Reach]], console: Console) -> None:
    several = any(len(group.runs) > 1 for group in groups)
    over = ["over level seeds for a single run"] if any(len(group.runs) == 1 for group in groups) else []
    over += ["over runs for several"] if several else []
    notes = [f"intervals: {' and '.join(over)}, where known; best: chosen on the very levels it is measured on"]
    if several:
        notes.append("several runs: mean over them, IQM the mean of the last ones' middle half; hours, steps/s: median")
    if any(result.at_the_latest for result in chain(*reaches.values())):
        notes.append("≤: there at the first held-out result, and maybe before (train.eval_every makes more of them)")
    for group in groups:
        for member in group.runs:
            if not member.held_out:
                notes.append(f"{member.path} has no held-out result yet: evaluate it with --all")
        seeds = [member.config.seed for member in group.runs]
        if len(set(seeds)) < len(seeds):
            notes.append(f"{group.letter}: some of its runs have the same seed, so they are no independent repetitions")
    console.print()
    for note in notes:
        console.print(note, style="dim", highlight=False, markup=False)


def _print_differences(groups: Sequence[Group], console: Console) -> None:
    table = Table(box=None, padding=(0, 1))
    table.add_column("they differ in", overflow="fold")
    table.add_column("value: runs", overflow="fold")
    for key, values in differences(groups).items():
        shared: dict[str, list[str]] = {}
        for letter, value in values.items():
            text = "not set" if value is None else value if isinstance(value, str) else json.dumps(value)
            shared.setdefault(text, []).append(letter)
        table.add_row(key, "; ".join(f"{value}: {', '.join(letters)}" for value, letters in shared.items()))
    if table.row_count:
        console.print()
        console.print(table, markup=False)


def _tree(group: Group, reaches: Sequence[Reach]) -> dict[str, Any]:
    """Return what the JSON file holds of a group."""
    first = group.runs[0]
    env = first.config.env
    return {
        "letter": group.letter,
        "name": group.name,
        "env_id": env.id,
        "env_options": env.options,
        "max_episode_steps": env.max_episode_steps,
        "headline": first.headline,
        "headline_max": first.headline_max,
        "best": group.best and asdict(group.best),
        "last": group.last and asdict(group.last),
        "reach": [asdict(result) for result in reaches],
        "runs": [
            {
                "path": str(run.path),
                "seed": run.config.seed,
                "env_steps": run.env_steps,
                "hours": run.hours,
                "steps_per_second": run.steps_per_second,
                "held_out": [asdict(point) for point in run.held_out],
            }
            for run in group.runs
        ],
    }
