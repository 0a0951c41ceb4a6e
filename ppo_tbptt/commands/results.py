"""What ``evaluate``, ``probe`` and the end of ``train`` share: agents and levels to play, and results as files."""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.parser import Parser, UsageError, integer_from, positive, seed
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import SEED_LIMIT, Config, EnvConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.agents import agent_at
from ppo_tbptt.run.files import JsonError, write_text

Outcome = TypeVar("Outcome")
MAX_EPISODES = 10**6
"""All are kept until the end."""


def add_agent(parser: Parser) -> None:
    """Add the path of what `Policy.load` takes."""
    text = "a run's folder (its newest checkpoint), a checkpoint, or an agent's folder or name (ppo-tbptt agents)"
    parser.add_argument("path", type=Path, metavar="RUN_OR_AGENT", help=text)


def add_level_options(parser: Parser) -> None:
    """Add the path, and the options of :func:`protocol_of`. What is not given is as the run itself evaluates."""
    add_agent(parser)
    parser.option("--num-seeds", type=positive, help="number of level seeds (default: the run's train.eval_num_seeds)")
    parser.option("--first-seed", type=seed, help="the first of them (default: train.eval_first_seed)")
    parser.option("--repeats", type=positive, help="episodes per level seed (default: train.eval_repeats)")
    greedy = "take the most probable actions (default: train.eval_greedy)"
    parser.option("--greedy", action="store_true", default=None, help=greedy)
    parser.option("--sampled", dest="greedy", action="store_false", default=None, help="sample actions")
    parser.option("--sampling-seed", type=seed, default=0, help="of the action noise (default 0)")
    parser.option("--max-steps", type=positive, help="truncate longer episodes (default: train.eval_max_steps)")
    workers = "worker processes (default: one per core; 0: this process)"
    parser.option("--num-workers", type=integer_from(0), help=workers)
    parser.option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def protocol_of(args: Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Return keyword arguments of :func:`~ppo_tbptt.evaluation.evaluate.evaluate`: from ``args``, else from ``config``.

    Tells the user where the levels are not held out.

    Raises:
        UsageError: too many episodes, or a level seed that is too large.
    """
    first, number, repeats, greedy, max_steps = (
        getattr(config.train, f"eval_{name}") if getattr(args, name) is None else getattr(args, name)
        for name in ("first_seed", "num_seeds", "repeats", "greedy", "max_steps")
    )
    if first + number > SEED_LIMIT or number * repeats > MAX_EPISODES:
        raise UsageError(
            f"--num-seeds {number}: at most {MAX_EPISODES:,} episodes can be played, "
            f"and no level seed is above {SEED_LIMIT - 1:,}"
        )
    if first < config.env.first_seed + config.env.num_seeds and config.env.first_seed < first + number:
        say(console, "note: these level seeds overlap the training seeds, so this is not a held-out evaluation")
    return {
        "seeds": range(first, first + number),
        "repeats": repeats,
        "greedy": greedy,
        "sampling_seed": args.sampling_seed,
        "max_steps": max_steps,
        "num_workers": "auto" if args.num_workers is None else args.num_workers,
    }


def load_agent(
    args: Namespace, overrides: dict[str, str], console: Console
) -> tuple[Policy, Path, EnvConfig, dict[str, Any]]:
    """Load the agent. Return it, the file it was in, the task that it is to play, and the :func:`protocol_of`."""
    policy = Policy.load(args.path, device=args.device)
    assert policy.path is not None
    config = policy.config.override(overrides)
    return policy, policy.path, config.env, protocol_of(args, config, console)


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
    """Return the file of an evaluation: in its run's folder, or for an agent in the current one; else None."""
    if agent_at(checkpoint.parent):  # what is handed on stays as it is
        return Path(file_name(checkpoint.parent, protocol))
    run = checkpoint.parent.parent
    return run / "evaluations" / file_name(checkpoint, protocol) if (run / "config.toml").is_file() else None


def file_name(checkpoint: Path, protocol: Mapping[str, Any]) -> str:
    """Name the file of an evaluation by its checkpoint or agent, and protocol, arguments of ``evaluate``."""
    seeds, forget_every = protocol["seeds"], protocol.get("forget_every")
    name = f"{checkpoint.stem}_levels{min(seeds)}-{max(seeds)}x{protocol['repeats']}"
    name += "_greedy" if protocol["greedy"] else f"_sampling{protocol['sampling_seed']}"
    name += "" if forget_every is None else f"_forget{forget_every}"
    return f"{name}.json"


def read_finished(file: Path, env_steps: int, protocol: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read an earlier result if it is of the same agent (``best.pt`` changes) and protocol, else None.

    A file that can't be read is no result: it is replaced.
    """
    try:
        tree = read_evaluation(file)
    except JsonError:
        return None
    wanted = {"forget_every": None, **protocol, "seeds": list(protocol["seeds"]), "env_steps": env_steps}
    return tree if all(tree[key] == value for key, value in wanted.items() if key != "num_workers") else None
