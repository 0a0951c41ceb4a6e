"""Evaluations as the commands run, print and save them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.run.files import write_text

Outcome = TypeVar("Outcome")


class _Stopped(Exception):
    """Raised in the progress callback after a signal."""


def evaluate_with_progress(
    play: Callable[..., Outcome], title: str, stop: Stop, console: Console, total: int | None = None
) -> Outcome | None:
    """Call ``play(progress=...)`` under a progress bar.

    ``progress`` takes the number of finished episodes, and optionally that of all.

    Returns:
        What ``play`` returns; None if a signal stopped it.
    """
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def progress(finished: int, total: int | None = None) -> None:
            bar.update(task, completed=finished, total=total)
            if stop.code():
                raise _Stopped

        try:
            return play(progress=progress)
        except _Stopped:
            return None


def save_result(path: Path | None, result: dict[str, Any], checkpoint: Path, env_steps: int) -> dict[str, Any]:
    """Add to a result what was evaluated, write it as JSON (nowhere for None) and return it."""
    agent = {"checkpoint": str(checkpoint), "env_steps": env_steps}
    tree = agent | result | agent  # first in the file, even where the result is another checkpoint's
    if path is not None:
        write_json(path, tree)
    return tree


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file atomically, in a folder that is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(tree, indent=1))


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """Print a saved evaluation."""
    seeds = result["seeds"]
    say(
        console,
        f"\n{result['env_id']} after {result['env_steps']:,} steps\n{result['episodes']} "
        f"{'greedy' if result['greedy'] else 'sampled'} episodes on {len(seeds)} held-out level seeds "
        f"({min(seeds)} to {max(seeds)})",
    )
    table = Table(box=None, padding=(0, 2))
    table.add_column("measure")
    for column in ("mean", "95 % interval"):
        table.add_column(column, justify="right")
    for name, measure in result["measures"].items():
        ci95 = measure["ci95"]
        table.add_row(name, f"{measure['mean']:.3f}", "-" if ci95 is None else f"{ci95[0]:.3f} to {ci95[1]:.3f}")
    console.print(table)
    if result["forget_every"] is not None:
        say(console, f"the recurrent state was wiped every {result['forget_every']} steps")
    if result["capped"]:
        say(console, f"{result['capped']} episodes were cut at {result['max_steps']:,} steps")


def default_path(checkpoint: Path, protocol: Mapping[str, Any]) -> Path | None:
    """Return the file of an evaluation in its run's folder; None for a checkpoint outside a run."""
    run = checkpoint.parent.parent
    return run / "evaluations" / file_name(checkpoint, protocol) if (run / "config.toml").is_file() else None


def file_name(checkpoint: Path, protocol: Mapping[str, Any]) -> str:
    """Name the file of an evaluation by its checkpoint and protocol, arguments of ``evaluate``."""
    seeds, forget_every = protocol["seeds"], protocol.get("forget_every")
    name = f"{checkpoint.stem}_levels{min(seeds)}-{max(seeds)}x{protocol['repeats']}"
    name += "_greedy" if protocol["greedy"] else f"_sampling{protocol['sampling_seed']}"
    name += "" if forget_every is None else f"_forget{forget_every}"
    return f"{name}.json"
