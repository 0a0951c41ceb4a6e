"""``export --agent``: evaluate a run's agent on the held-out levels, and write the folder to hand on."""

import csv
import json
import os
import re
import shlex
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ppo_tbptt.analysis.runs import PROTOCOL, Run, read_run
from ppo_tbptt.commands.agents import print_card
from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.parser import UsageError, split_overrides
from ppo_tbptt.commands.results import evaluate_with_progress, file_name, read_finished, save_result
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import Config, ConfigError, keys_marked
from ppo_tbptt.config.resume import changes
from ppo_tbptt.config.shipped import CONFIGS, config_names
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.agents import AgentDir, Card, CurvePoint, Levels, Measure
from ppo_tbptt.run.files import replacing_folder, write_text
from ppo_tbptt.run.folder import RunDir, reporting
from ppo_tbptt.run.weights import save_weights
from ppo_tbptt.runtime.device import versions
from ppo_tbptt.watch.environment import watched_env
from ppo_tbptt.watch.recording import failed, record_episode
from ppo_tbptt.watch.video import frames_of, gif

LEVELS = range(PROTOCOL.eval_first_seed, PROTOCOL.eval_first_seed + PROTOCOL.eval_num_seeds)
"""The held-out level seeds of every card, each played ``PROTOCOL.eval_repeats`` times with sampled actions."""
CURVE_POINTS = 200
"""Training episodes of longer runs are averaged over neighbouring iterations."""
GIF_FPS, GIF_FRAMES, GIF_HOLD = 6, 120, 6
"""Of longer episodes every second, third, ... frame is shown, as fast. The last one is held for so many frames."""
GIF_TRIES = 10
"""The GIF shows the first success on so many levels."""


class _Stopped(Exception):
    """A signal came during an evaluation."""


def export_agent(args: Namespace, console: Console) -> int:
    """Do what ``--agent`` asks for and return the exit code.

    The evaluations are kept in the run, so that a command that was stopped goes on when it is given again.

    Raises:
        UsageError: the path is no run, or there is something else where the folder is to be.
    """
    target = _target(args)
    run, policy, chosen = _load(args.path)
    other = None if args.without_memory is None else _without_memory(args.without_memory, policy.config)
    with reporting(target.parent, "write in this folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
    with Stop(quiet=True) as stop:
        try:
            result = _evaluation(policy, run, "held-out levels", stop, console)
            wiped = without = None
            if policy.agent.core.state_size:
                wiped = _evaluation(policy, run, "the same with its state wiped", stop, console, forget_every=1)
            if other is not None:
                without = _evaluation(other[1], other[0], "an agent without memory", stop, console)
        except _Stopped:
            say(console, f"stopped; {target} was not written; give the command again to go on")
            return stop.code()
    say(console, "recording an episode")
    episode = _episode(policy, args.agent)
    progress = read_run(run.path)
    at = min(progress.training or progress.held_out, key=lambda point: abs(point.env_steps - policy.env_steps))
    config, command = origin(policy.config, progress.ranks)
    card = Card(
        name=args.agent,
        env_id=policy.config.env.id,
        options=policy.config.env.options,
        max_episode_steps=policy.config.env.max_episode_steps,
        core=policy.config.core.kind,
        parameters=sum(p.numel() for p in policy.agent.parameters()),
        headline=policy.spec.headline,
        headline_max=policy.spec.headline_max,
        levels=Levels(
            first_seed=LEVELS.start,
            num_seeds=len(LEVELS),
            repeats=result["repeats"],
            greedy=result["greedy"],
            sampling_seed=result["sampling_seed"],
        ),
        result=_headline(result),
        measures={name: _measure(result, name) for name in result["measures"]},
        wiped=None if wiped is None else _headline(wiped),
        without_memory=None if without is None else _headline(without),
        env_steps=policy.env_steps,
        hours=round(at.hours, 6),
        machine=args.machine or _this_machine(policy.config),
        ranks=progress.ranks,
        seed=policy.config.seed,
        chosen=chosen,
        config=config,
        command=command,
        versions=versions(torch.device("cpu")).splitlines()[:-1],
    )
    _write(target, policy, card, progress, episode)
    print_card(AgentDir(target), card, console)
    if args.machine is None:
        say(console, "\nnote: the machine is this one; --machine TEXT, if it was trained on another")
    if chosen == _best_on(LEVELS.start, len(LEVELS)):
        say(console, "note: the checkpoint was chosen on the levels of the result, which flatters it")
    size = sum(file.stat().st_size for file in AgentDir(target).files)
    say(console, f"\nwritten to {target} ({size / 1e6:.1f} MB); watch it: ppo-tbptt enjoy {target}")
    return 0


def _target(args: Namespace) -> Path:
    """Return the folder to write, which does not exist or holds an agent and nothing else."""
    if not re.fullmatch(r"\w[\w-]*", args.agent, re.ASCII):
        raise UsageError(f"--agent {args.agent}: must be a name of letters, digits, _ and -")
    folder: Path = args.out or Path()
    target = folder / args.agent
    if os.path.lexists(folder) and not (os.path.isdir(folder) and os.access(folder, os.W_OK)):
        raise UsageError(f"--out {folder}: must be a folder that can be written to")
    if os.path.lexists(target):
        others = set(target.iterdir()) - set(AgentDir(target).files) if os.path.isdir(target) else {target}
        if others or target.is_symlink():
            what = f"{target} is there and no agent's folder ({min(others, default=target).name})"
            raise UsageError(f"--agent {args.agent}: {what}; choose another name, or another --out")
    return target


def _load(path: Path) -> tuple[RunDir, Policy, str]:
    """Load the agent of the run that ``path`` is or is a checkpoint of, and say how its checkpoint was chosen.

    Raises:
        UsageError: there is no run, or the levels of the cards are not held out.
        CheckpointError: it has no checkpoint that can be used.
    """
    is_folder = os.path.isdir(path)
    run = RunDir(path if is_folder else path.parent.parent)
    if not os.path.isfile(run.config) or not os.path.isfile(run.metrics):
        text = "no run (a folder with config.toml and metrics.jsonl), nor a checkpoint in one"
        raise UsageError(f"{path}: {text}; an agent's folder can't be made of it")
    train = Config.load(run.config).train
    if is_folder:
        path = run.best if train.eval_every and run.best.is_file() else run.newest()
    policy = Policy.load(path)
    env = policy.config.env
    if env.first_seed < LEVELS.stop and LEVELS.start < env.first_seed + env.num_seeds:
        text = f"trained on level seeds {env.first_seed} to {env.first_seed + env.num_seeds - 1}"
        raise UsageError(f"{path}: {text}, so that {LEVELS.start} to {LEVELS.stop - 1} are not held out")
    best = _best_on(train.eval_first_seed, train.eval_num_seeds) if train.eval_every else "best on training episodes"
    return run, policy, best if path.name == run.best.name else "last checkpoint" if is_folder else path.name


def _best_on(first: int, number: int) -> str:
    return f"best of the run on level seeds {first} to {first + number - 1}"


def _evaluation(policy: Policy, run: RunDir, title: str, stop: Stop, console: Console, **how: Any) -> dict[str, Any]:
    """Evaluate by the protocol of the cards, or read what was evaluated before; in the run's folder.

    Raises:
        _Stopped: a signal came.
    """
    protocol = {"seeds": LEVELS, "repeats": PROTOCOL.eval_repeats, "greedy": False, "sampling_seed": 0}
    protocol |= {"max_steps": PROTOCOL.eval_max_steps, "forget_every": None, **how}
    protocol["num_workers"] = policy.config.env.num_workers
    assert policy.path is not None
    file = run.evaluations / file_name(policy.path, protocol)
    for known in (file, run.evaluations / "final.json"):
        if tree := read_finished(known, policy.env_steps, protocol):
            say(console, f"{title}: evaluated already, {known}")
            return tree
    say(console, f"{title}: {len(LEVELS) * protocol['repeats']} episodes")
    play = partial(evaluate, policy.agent, policy.config.env, **protocol)
    evaluation = evaluate_with_progress(play, title, stop, console, total=len(LEVELS) * protocol["repeats"])
    if evaluation is None:
        raise _Stopped
    return save_result(file, asdict(evaluation), policy.path, policy.env_steps)


def _without_memory(path: Path, config: Config) -> tuple[RunDir, Policy]:
    """Load the agent without memory.

    Raises:
        UsageError: it has a memory, or another task than ``config``.
    """
    run, policy, _ = _load(path)
    if policy.agent.core.state_size:
        raise UsageError(f"--without-memory {path}: has a memory (core.kind = {policy.config.core.kind!r})")
    ours, theirs = ([env.id, env.options, env.max_episode_steps] for env in (config.env, policy.config.env))
    if ours != theirs:
        raise UsageError(f"--without-memory {path}: another task, {theirs}; must be {ours}")
    return run, policy


def _headline(result: dict[str, Any]) -> Measure:
    return _measure(result, result["headline"])


def _measure(result: dict[str, Any], name: str) -> Measure:
    measure = result["measures"][name]
    return Measure(mean=measure["mean"], ci95=measure["ci95"] and tuple(measure["ci95"]))


def origin(config: Config, ranks: int = 1) -> tuple[str | None, str]:
    """Return the package's config that a run's ``config`` differs least from, and the command that trains with it.

    What changes no result (where and how safely a run is done, what it keeps) is left out. A precision of float32 is
    taken for what ``auto`` was. Without a config of the same environment the command trains with the agent's own.
    """
    start = f"torchrun --nproc-per-node {ranks} -m ppo_tbptt train" if ranks > 1 else "ppo-tbptt train"
    found: list[tuple[int, str, list[str]]] = []
    for name in config_names():
        base = Config.load(CONFIGS / f"{name}.toml")
        if base.env.id == config.env.id:
            options = [f"--{key.replace('_', '-')}={_text(new)}" for key, new in _differing(base, config).items()]
            found.append((len(options), name, options))
    for _, name, options in sorted(found):
        try:
            again = Config.load(CONFIGS / f"{name}.toml", split_overrides(options, {})[1])
        except (ConfigError, UsageError):  # values that no command line can say
            continue
        if not _differing(again, config):
            return name, " ".join([start, name, *(shlex.quote(part) for o in options for part in o.split("=", 1))])
    return None, f"{start} config.toml"


def _differing(base: Config, config: Config) -> dict[str, Any]:
    """Return the settings of ``config`` that ``base`` must be given to train alike, by dotted key."""
    auto = {"precision": "float32"} if base.precision == "auto" else {}
    without = keys_marked("same_setting") - {"seed"}
    found: dict[str, Any] = {}
    for key, (_, new) in changes(base.replace(**auto).to_dict(), config.to_dict()).items():
        if key not in without:  # a schedule in the place of a number is given part by part
            found |= {f"{key}.{part}": value for part, value in new.items()} if isinstance(new, dict) else {key: new}
    return found


def _text(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _this_machine(config: Config) -> str:
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    hardware = versions(device).splitlines()[-1].partition(": ")[2]
    cores = resolve_workers("auto", 2**16)
    return (
        f"{cores} core{'s' * (cores > 1)} of {hardware}" if device.type == "cpu" else f"{hardware}, {cores} CPU cores"
    )


def _episode(policy: Policy, name: str) -> bytes:
    """Encode the first of the held-out episodes that is no failure, or of ten failures the last, as a GIF."""
    recording = None
    with watched_env(policy.config.env, policy.agent.previous) as env:
        for seed in LEVELS[:GIF_TRIES]:
            recording = record_episode(policy, env, seed=seed, max_steps=2_000)
            if not failed(recording):
                break
    assert recording is not None
    frames = frames_of([recording], note=name)
    stride = -(-len(frames) // GIF_FRAMES)
    shown = frames[::-1][::stride][::-1]  # the last one among them
    return gif([*shown, *[shown[-1]] * GIF_HOLD], GIF_FPS)


def _curve(run: Run) -> str:
    """Write the run's curve as CSV."""
    rows: dict[int, CurvePoint] = {}
    for part in np.array_split(np.arange(len(run.training)), min(CURVE_POINTS, max(1, len(run.training)))):
        points = [run.training[i] for i in part]
        if points:
            mean = float(np.mean([point.mean for point in points]))
            rows[points[-1].env_steps] = CurvePoint(points[-1].env_steps, points[-1].hours, mean, None, None, None)
    for point in run.held_out:
        low, high = point.ci95 or (None, None)
        before = rows.get(point.env_steps)
        training = before and before.training
        rows[point.env_steps] = CurvePoint(point.env_steps, point.hours, training, point.mean, low, high)
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CurvePoint._fields)
    for _, row in sorted(rows.items()):
        writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
    return text.getvalue()


def _write(target: Path, policy: Policy, card: Card, run: Run, episode: bytes) -> None:
    with replacing_folder(target) as folder:
        agent = AgentDir(folder)
        save_weights(agent.weights, policy.agent.state_dict(), policy.config, policy.spec, policy.env_steps)
        write_text(agent.config, policy.config.to_toml())
        write_text(agent.curve, _curve(run))
        agent.episode.write_bytes(episode)
        write_text(agent.card, json.dumps(card.model_dump(mode="json"), indent=1) + "\n")
