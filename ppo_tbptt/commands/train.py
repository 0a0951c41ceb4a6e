"""``train``: a run from a config, or on from a checkpoint; at its end what was learnt, on held-out level seeds."""

import sys
from collections.abc import Callable
from pathlib import Path
from time import strftime
from typing import Literal

import torch
from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError
from ppo_tbptt.commands.results import evaluate_with_progress, print_evaluation, read_evaluation, save_evaluation
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import Config, parse_overrides
from ppo_tbptt.console import Display
from ppo_tbptt.device import has_fast_bfloat16
from ppo_tbptt.distributed import World
from ppo_tbptt.run_dir import RunDir
from ppo_tbptt.trainer import Trainer


def run(argv: list[str]) -> int:
    parser = Parser(
        "train",
        "Train an agent, and evaluate it on held-out level seeds at the end.",
        "Every field of the config can be set: --ppo.learning-rate 1e-4, --core.kind lstm, --env.num-envs 8, "
        "--seed 3, --total-steps 1e6, --device cpu, ... (ppo-tbptt show --defaults lists them all).",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="a TOML file, such as configs/*.toml")
    parser.option("--run-dir", type=Path, help="folder of the run (default: runs/NAME_DATE-TIME)")
    parser.option("--resume", type=Path, metavar="RUN", help="go on with this run from its newest checkpoint")
    parser.option(
        "--continue",
        dest="go_on",
        action="store_true",
        help="start --run-dir, or go on with it where it is unfinished, or show its result where it is finished",
    )
    args, rest = parser.parse_with_overrides(argv)
    overrides = parse_overrides(rest)
    if args.resume is not None:
        if args.config is not None or args.run_dir is not None:
            raise UsageError("--resume takes its config and folder from the run; leave out CONFIG and --run-dir")
        with World.join() as world:
            return _train(lambda: Trainer.resume(args.resume, overrides, world=world), world)
    if args.config is None:
        raise UsageError("a CONFIG is needed, such as configs/quickstart.toml (or --resume RUN)")
    config = Config.load(args.config, overrides)
    run_dir = args.run_dir or Path("runs") / f"{args.config.stem}_{strftime('%Y%m%d-%H%M%S')}"
    with World.join() as world:
        # Rank 0 decides for all: the others may have another clock, and find files that it has just written.
        plan = _plan(run_dir, args.go_on) if world.rank == 0 else ""
        plan, name = world.gather_json([plan, str(run_dir)])[0]
        run_dir = Path(name)
        if plan == "show":
            return _show_finished(RunDir.open(run_dir), _console(world))
        if plan == "go on":
            return _train(lambda: Trainer.resume(run_dir, overrides, world=world), world)
        return _train(lambda: Trainer(config, run_dir, world=world), world)


def _console(world: World) -> Console:
    return Console(quiet=world.rank > 0, markup=False, emoji=False)


def _plan(run_dir: Path, go_on: bool) -> Literal["start", "go on", "show"]:
    run = RunDir(run_dir)
    if go_on:
        if (run.evaluations / "final.json").is_file():
            return "show"
        if run.periodic():
            return "go on"
        if run.config.is_file():
            _clear_unstarted(run)
    return "start"


def _clear_unstarted(run: RunDir) -> None:
    """A run that was killed before its first checkpoint has nothing to go on from: start it again.

    Nothing is deleted behind a link, nor where anything lies that such a run does not leave: the folder then counts as
    one that exists already.
    """
    if any(path.is_symlink() for path in (run.checkpoints, run.evaluations)):
        return
    files = [run.config, run.metrics, *run.path.glob("events.out.tfevents.*"), *run.path.glob(".*.tmp")]
    files += [run.best, *run.checkpoints.glob(".*.tmp"), *run.evaluations.glob(".*.tmp")]
    folders = [folder for folder in (run.checkpoints, run.evaluations) if folder.is_dir()]
    entries = [path for folder in (run.path, *folders) for path in folder.iterdir()]
    if set(entries) <= {*files, *folders}:
        for path in files:
            path.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()


def _train(make: Callable[[], Trainer], world: World) -> int:
    console = _console(world)
    with Stop(quiet=world.size > 1) as stop, make() as trainer:
        assert trainer.run is not None
        _print_start(trainer, console)
        number = 0
        sizes = {"batch_size": trainer.batch_size, "num_iterations": trainer.num_iterations}
        with Display(trainer.config, console, **sizes) as display:
            for report in trainer:
                display.update(report)
                number = world.largest(stop.signal)  # a signal to any rank stops all after the same iteration
                if number:
                    break
        if number:
            path = trainer.save()
            console.print(f"stopped at {trainer.env_steps:,} steps; checkpoint: {path}", soft_wrap=True)
            console.print(f"go on with: {_typed('train', f'--resume {trainer.run.path}')}", soft_wrap=True)
            return 128 + number
        code = _finish(trainer, trainer.run, stop, console) if world.rank == 0 else 0
        return world.gather_json(code)[0]  # where the other ranks wait for rank 0


def _print_start(trainer: Trainer, console: Console) -> None:
    config, spec = trainer.config, trainer.envs.spec
    parameters = sum(p.numel() for p in trainer.agent.parameters())
    where = "in this process" if not trainer.envs.num_workers else f"in {trainer.envs.num_workers} workers"
    ranks = f" on each of {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    console.print(
        f"{spec.env_id}: {config.env.num_envs} environments {where}{ranks}; {config.core.kind} agent of {parameters:,} "
        f"parameters in {config.precision} on {trainer.device}{threads}",
        highlight=False,
        soft_wrap=True,
    )
    if trainer.device.type == "cpu" and config.precision == "float32" and has_fast_bfloat16():
        console.print("this CPU has bfloat16 arithmetic: --precision bfloat16 is faster", soft_wrap=True)
    if trainer.restored_ranks not in (None, trainer.world.size):
        console.print(
            f"the checkpoint is of {trainer.restored_ranks} rank(s), this run of {trainer.world.size}: "
            "action noise, minibatches and dropout begin new random streams",
            highlight=False,
            soft_wrap=True,
        )
    resumed = f"going on after {trainer.iteration:,} iterations: " if trainer.iteration else ""
    console.print(
        f"{resumed}{trainer.num_iterations - trainer.iteration:,} iterations of {trainer.batch_size:,} steps; "
        f"run folder: {trainer.run.path if trainer.run else None}",
        highlight=False,
        soft_wrap=True,
    )


def _finish(trainer: Trainer, run: RunDir, stop: Stop, console: Console) -> int:
    """Evaluate the trained agent, with its memory and without, save and print the result."""
    checkpoint = run.checkpoint(trainer.iteration)
    evaluation = evaluate_with_progress(trainer.evaluate, "held-out levels", stop, console)
    forgetful = None
    if trainer.agent.core.state_size and not stop.signal:
        forgetful = evaluate_with_progress(
            lambda **kwargs: trainer.evaluate(forget_every=1, **kwargs), "the same without memory", stop, console
        )
    if evaluation is None or (trainer.agent.core.state_size and forgetful is None):
        again = _typed("train", f"--resume {run.path}")
        console.print(f"stopped before the evaluation was done; go on with: {again}", soft_wrap=True)
        return 128 + stop.signal
    extra = {"headline_without_memory": None if forgetful is None else forgetful.measures[forgetful.headline].mean}
    save_evaluation(run.evaluations / "final.json", evaluation, checkpoint, trainer.env_steps, extra)
    return _show_finished(run, console)


def _python() -> Path:
    """This interpreter, as short as it can be typed here."""
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python


def _typed(command: str, arguments: object) -> str:
    """How to type a command of this package in this folder."""
    script = Path("scripts", f"{command}.py")
    return f"{_python()} {script} {arguments}" if script.is_file() else f"ppo-tbptt {command} {arguments}"


def _show_finished(run: RunDir, console: Console) -> int:
    path = run.evaluations / "final.json"
    result = read_evaluation(path)
    print_evaluation(result, console)
    without = result.get("headline_without_memory")
    if without is not None:
        console.print(
            f"with its recurrent state wiped before every step the same agent gets {result['headline']} {without:.3f}",
            soft_wrap=True,
        )
    for title, command in {
        "curves": f"{_python()} -m tensorboard.main --logdir {run.path.parent}",
        "evaluate": _typed("evaluate", run.path),
        "watch": _typed("enjoy", f"{run.path} --video episode.mp4"),
        "a MemoryGym task": _typed("train", "configs/mortar_mayhem_grid.toml"),
    }.items():
        console.print(f"  {title:<17} {command}", highlight=False, soft_wrap=True)
    return 0
