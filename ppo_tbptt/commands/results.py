"""Evaluations: with a progress line, on the screen and in a file."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from ppo_tbptt.commands.console import measures_table
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import EnvConfig
from ppo_tbptt.evaluation.evaluate import Evaluation
from ppo_tbptt.evaluation.statistics import Estimate
from ppo_tbptt.run.files import write_text

Outcome = TypeVar("Outcome")


class _Stopped(Exception):
    """The user asked to stop."""


def evaluate_with_progress(
    play: Callable[..., Outcome], title: str, stop: Stop, console: Console, total: int | None = None
) -> Outcome | None:
    """Call ``play(progress=...)`` under a progress bar; None where it was stopped by a signal.

    ``progress`` takes the number of finished episodes, and that of all where ``total`` is not known from the start.
    """
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def progress(finished: int, total: int | None = None) -> None:
            bar.update(task, completed=finished, total=total)
            if stop.code:
                raise _Stopped

        try:
            return play(progress=progress)
        except _Stopped:
            return None


def save_evaluation(
    path: Path | None, evaluation: Evaluation, checkpoint: Path, env_steps: int, extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write the evaluation as JSON (whole or not at all; nowhere for None) and return it as a tree."""
    tree = {"checkpoint": str(checkpoint), "env_steps": env_steps, **evaluation.to_dict(), **(extra or {})}
    if path is not None:
        write_result(path, tree)
    return tree


def write_result(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(tree, indent=1))


def wide_console() -> Console:
    """For tables: as wide as the terminal, and 100 columns where there is none (rich would take 80)."""
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=100, markup=False, emoji=False)


def note_overlap(env: EnvConfig, seeds: range, console: Console) -> None:
    """Say so where levels were seen in training."""
    if seeds.start < env.first_seed + env.num_seeds and env.first_seed < seeds.stop:
        console.print("note: these level seeds overlap the training seeds, so this is not a held-out evaluation")


def print_evaluation(result: dict[str, Any], console: Console) -> None:
    """A saved evaluation for a person."""
    seeds = result["seeds"]
    console.print(
        f"\n{result['env_id']} after {result['env_steps']:,} steps\n{result['episodes']} "
        f"{'greedy' if result['greedy'] else 'sampled'} episodes on {len(seeds)} held-out level seeds "
        f"({min(seeds)} to {max(seeds)})",
        highlight=False,
        soft_wrap=True,
    )
    measures = {
        name: Estimate(mean=m["mean"], ci95=None if m["ci95"] is None else tuple(m["ci95"]))
        for name, m in result["measures"].items()
    }
    console.print(measures_table(measures))
    if result["forget_every"] is not None:
        console.print(f"the recurrent state was wiped every {result['forget_every']} steps", highlight=False)
    if result["capped"]:
        console.print(f"{result['capped']} episodes were cut at {result['max_steps']:,} steps")


def default_path(checkpoint: Path, evaluation: Evaluation) -> Path | None:
    """Where an evaluation goes when no file is named: into its run's folder; None for a lone checkpoint."""
    run = checkpoint.parent.parent
    if not (run / "config.toml").is_file():
        return None
    e = evaluation
    return run / "evaluations" / file_name(checkpoint, e.seeds, e.repeats, e.greedy, e.sampling_seed, e.forget_every)


def file_name(
    checkpoint: Path, seeds: Sequence[int], repeats: int, greedy: bool, sampling_seed: int, forget_every: int | None
) -> str:
    """Of an evaluation that is done in this way, without its folder."""
    name = f"{checkpoint.stem}_levels{min(seeds)}-{max(seeds)}x{repeats}"
    name += "_greedy" if greedy else f"_sampling{sampling_seed}"
    name += "" if forget_every is None else f"_forget{forget_every}"
    return f"{name}.json"
