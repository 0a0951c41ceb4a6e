"""``evaluate --all``: play the same held-out level seeds with every checkpoint of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from ppo_tbptt.commands.console import interval, say, wide_console
from ppo_tbptt.commands.parser import UsageError, writing
from ppo_tbptt.commands.results import evaluate_with_progress, file_name, note_overlap, save_result, write_json
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import Config, TrainConfig
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.run.files import JsonError
from ppo_tbptt.run.folder import RunDir, RunDirError

Tree = dict[str, Any]


def evaluate_all(
    path: Path,
    protocol_of: Callable[[TrainConfig], Mapping[str, Any]],
    overrides: dict[str, str],
    *,
    device: str,
    json_file: Path | None,
) -> int:
    """Evaluate all checkpoints, write a file for each and print a table.

    A result that already has its file is read from it. With ``overrides`` the task is another than the run's, and no
    result is read from the run's folder or written there.

    Args:
        path: the run's folder.
        protocol_of: makes the arguments of ``evaluate`` from the run's own settings.
        overrides: of the config's ``env``.
        device: to evaluate on.
        json_file: where to write all results together.

    Returns:
        The exit code.
    """
    try:
        run = RunDir.open(path)
    except RunDirError as error:
        raise UsageError(f"--all takes a run's folder; {error}") from error
    checkpoints = run.periodic() + ([run.best] if run.best.is_file() else [])
    if not checkpoints:
        run.newest()  # raises the error
    config = Config.load(run.config).override(overrides)
    env, protocol = config.env, protocol_of(config.train)
    console = wide_console()
    note_overlap(env, protocol["seeds"], console)
    episodes = len(protocol["seeds"]) * protocol["repeats"]
    results: dict[Path, Tree] = {}

    def play(progress: Callable[[int], None]) -> bool:
        for number, checkpoint in enumerate(checkpoints):
            before = number * episodes
            progress(before)
            if not checkpoint.is_file():
                say(console, f"{checkpoint.name}: the run has deleted it meanwhile")
                continue
            try:
                policy = Policy.load(checkpoint, device=device)
            except CheckpointError as error:
                say(console, f"left out: {error}")
                continue
            target = None if overrides else run.evaluations / file_name(checkpoint, protocol)
            tree = _read_finished(target, policy.env_steps, protocol["max_steps"])
            if tree is not None and target is not None:
                say(console, f"{checkpoint.name}: evaluated already, {target.name}")
            else:
                same = [r for r in results.values() if r["env_steps"] == policy.env_steps]  # best.pt of a periodic one
                tree = same[0] if same else None
                if tree is None:
                    tree = evaluate(
                        policy.agent,
                        policy.config.override(overrides).env,
                        progress=lambda finished, before=before: progress(before + finished),
                        **protocol,
                    ).to_dict()
                tree = save_result(target, tree, checkpoint, policy.env_steps)
            results[checkpoint] = tree
        return True

    with Stop(quiet=True) as stop:
        finished = evaluate_with_progress(play, "checkpoints", stop, console, total=len(checkpoints) * episodes)
        if finished is None:
            say(console, f"stopped after {len(results)} of {len(checkpoints)} checkpoints")
            return stop.code
    trees = sorted(results.values(), key=lambda tree: tree["env_steps"])
    seeds, way = protocol["seeds"], "greedy" if protocol["greedy"] else "sampled"
    levels = f"{len(seeds)} level seeds ({min(seeds)} to {max(seeds)})"
    say(
        console, f"\n{len(trees)} checkpoints, {protocol['repeats']} {way} episodes on each of {levels}; 95 % intervals"
    )
    if trees:
        console.print(_table(trees))
    if not overrides:
        say(console, f"written to {run.evaluations}")
    if json_file is not None:
        with writing("--json", json_file):
            write_json(json_file, trees)
        say(console, f"written to {json_file}")
    return 0


def _read_finished(target: Path | None, env_steps: int, max_steps: int) -> Tree | None:
    """Read an earlier result if it is of the same agent (``best.pt`` changes) and protocol.

    The file's name tells the rest of the protocol. A file that can't be read is replaced.
    """
    if target is None or not target.is_file():
        return None
    try:
        tree = read_evaluation(target)
    except JsonError:
        return None
    return tree if (tree["env_steps"], tree["max_steps"]) == (env_steps, max_steps) else None


def _table(trees: list[Tree]) -> Table:
    names = dict.fromkeys((trees[0]["headline"], "success"))
    table = Table(box=None, padding=(0, 1))
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("checkpoint", overflow="fold")
    for name in names:
        if name in trees[0]["measures"]:
            table.add_column(name, justify="right", no_wrap=True)
    for tree in trees:
        cells = [interval(m["mean"], m["ci95"]) for name in names if (m := tree["measures"].get(name)) is not None]
        table.add_row(f"{tree['env_steps']:,}", Path(tree["checkpoint"]).name, *cells)
    return table
