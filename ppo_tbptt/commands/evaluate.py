"""``evaluate``: play held-out level seeds with a checkpoint, or with all that a run has kept."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_tbptt.commands.console import interval, say, wide_console
from ppo_tbptt.commands.parser import Parser, UsageError, check_target, positive
from ppo_tbptt.commands.results import (
    add_level_options,
    default_path,
    evaluate_with_progress,
    file_name,
    load_agent,
    print_evaluation,
    protocol_of,
    read_finished,
    save_result,
    write_json,
)
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.agents import agent_at
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.run.folder import RunDir, RunDirError


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "evaluate",
        "Play held-out level seeds with a trained agent; by default as its run evaluates (train.eval_*).",
        'The task itself can be changed: --env.options.command-count "[3]".',
    )
    add_level_options(parser)
    parser.option("--forget-every", type=positive, help="wipe the recurrent state every so many steps of an episode")
    parser.option("--json", type=Path, metavar="FILE", help="write the result there instead; with --all, all there too")
    parser.option("--all", action="store_true", help="every checkpoint that the run has kept, where not done already")
    args, overrides = parser.parse_with_overrides(argv, only="env.")
    check_target("--json", args.json)
    if args.all:
        return _evaluate_all(args, overrides)
    console = Console(markup=False, emoji=False)
    policy, checkpoint, env, protocol = load_agent(args, overrides, console)
    protocol["forget_every"] = args.forget_every
    play = partial(evaluate, policy.agent, env, **protocol)
    with Stop(quiet=True) as stop:
        total = len(protocol["seeds"]) * protocol["repeats"]
        evaluation = evaluate_with_progress(play, "episodes", stop, console, total=total)
        if evaluation is None:
            return stop.code()
    target = args.json or (None if overrides else default_path(checkpoint, protocol))
    tree = save_result(None, asdict(evaluation), checkpoint, policy.env_steps)
    print_evaluation(tree, console)
    if target is not None:
        write_json(target, tree)
        say(console, f"written to {target}")
    return 0


def _evaluate_all(args: Namespace, overrides: dict[str, str]) -> int:
    """Evaluate all checkpoints, write a file for each, print a table and return the exit code.

    A result that already has its file is read from it. With ``overrides`` of the config's ``env`` the task is another
    than the run's, and no result is read from the run's folder or written there.
    """
    try:
        if agent_at(args.path):
            raise RunDirError(f"{args.path} is an agent, which has one checkpoint")
        run = RunDir.open(args.path)
    except RunDirError as error:
        raise UsageError(f"--all takes a run's folder; {error}") from error
    checkpoints = run.periodic() + ([run.best] if run.best.is_file() else [])
    if not checkpoints:
        run.newest()  # raises the error
    console = wide_console()
    protocol = protocol_of(args, Config.load(run.config).override(overrides), console)
    protocol["forget_every"] = args.forget_every
    seeds, repeats = protocol["seeds"], protocol["repeats"]
    episodes = len(seeds) * repeats
    results: list[dict[str, Any]] = []

    def play(progress: Callable[[int], None]) -> list[dict[str, Any]]:
        for number, checkpoint in enumerate(checkpoints):
            progress(number * episodes)
            try:
                policy = Policy.load(checkpoint, device=args.device)
            except CheckpointError as error:
                say(console, f"left out: {error}")
                continue
            target = None if overrides else run.evaluations / file_name(checkpoint, protocol)
            tree = target and read_finished(target, policy.env_steps, protocol)
            if tree and target:
                say(console, f"{checkpoint.name}: evaluated already, {target.name}")
            else:
                # best.pt is often the same as a periodic checkpoint.
                tree = next((r for r in results if r["env_steps"] == policy.env_steps), None)
                if tree is None:
                    env = policy.config.override(overrides).env
                    evaluation = evaluate(
                        policy.agent, env, progress=lambda n, before=number * episodes: progress(before + n), **protocol
                    )
                    tree = asdict(evaluation)
                tree = save_result(target, tree, checkpoint, policy.env_steps)
            results.append(tree)
        return results

    with Stop(quiet=True) as stop:
        if evaluate_with_progress(play, "checkpoints", stop, console, total=len(checkpoints) * episodes) is None:
            say(console, f"stopped after {len(results)} of {len(checkpoints)} checkpoints")
            return stop.code()
    results.sort(key=lambda tree: tree["env_steps"])
    way = "greedy" if protocol["greedy"] else "sampled"
    span = f"{len(seeds)} level seeds ({min(seeds)} to {max(seeds)})"
    say(console, f"\n{len(results)} checkpoints, {repeats} {way} episodes on each of {span}; 95 % intervals")
    if results:
        console.print(_table(results))
    if not overrides:
        say(console, f"written to {run.evaluations}")
    if args.json is not None:
        write_json(args.json, results)
        say(console, f"written to {args.json}")
    return 0


def _table(trees: list[dict[str, Any]]) -> Table:
    names = [name for name in dict.fromkeys((trees[0]["headline"], "success")) if name in trees[0]["measures"]]
    table = Table(box=None, padding=(0, 1))
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("checkpoint", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for tree in trees:
        cells = [interval(m["mean"], m["ci95"]) for name in names if (m := tree["measures"].get(name)) is not None]
        table.add_row(f"{tree['env_steps']:,}", Path(tree["checkpoint"]).name, *cells)
    return table
