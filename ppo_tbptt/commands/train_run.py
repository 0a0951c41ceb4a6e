"""Start or resume a run, and evaluate the agent on held-out level seeds at its end."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import strftime
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress

from ppo_tbptt.commands.console import Display, say
from ppo_tbptt.commands.results import evaluate_with_progress, print_evaluation, save_result
from ppo_tbptt.commands.stop import IterationAborted, Stop
from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.folder import LOCK_FILE, RunDir, RunLock
from ppo_tbptt.runtime.device import has_fast_bfloat16
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.watch.training_video import RecordVideos


def resume_or_start(args: Namespace, config: Config | None, overrides: dict[str, str]) -> int:
    """Do what ``train``'s arguments ask for; without ``config`` they name a run to resume."""
    stop = Stop(minutes=args.max_minutes)
    with World.join() as world:
        console = Console(quiet=world.rank > 0, markup=False, emoji=False)
        if config is None:
            return _train(partial(Trainer.resume, args.resume, overrides), world, stop, console)
        run_dir = args.run_dir or Path("runs") / f"{args.config.stem}_{strftime('%Y%m%d-%H%M%S')}"
        # Rank 0 decides for all: another rank's clock may differ, and it may find files that rank 0 has just written.
        plan = plan_of(run_dir, go_on=args.go_on) if world.rank == 0 else ""
        plan, name = world.gather_json([plan, str(run_dir)])[0]
        run_dir = Path(name)
        if plan == "print":
            return _print_finished(RunDir.open(run_dir), console)
        if plan == "resume":
            return _train(partial(Trainer.resume, run_dir, overrides), world, stop, console)
        return _train(partial(Trainer, config, run_dir), world, stop, console)


def plan_of(run_dir: Path, *, go_on: bool) -> Literal["start", "resume", "print"]:
    """Decide what to do in ``run_dir``; with ``go_on`` a run that was killed before its first checkpoint is cleared."""
    run = RunDir(run_dir)
    if go_on:
        if (run.evaluations / "final.json").is_file():
            return "print"
        if run.periodic():
            return "resume"
        if run.config.is_file():
            _clear_unstarted(run)
    return "start"


def _clear_unstarted(run: RunDir) -> None:
    """Empty the folder of a run that was killed before its first checkpoint, so that it can be started again.

    Nothing is deleted if a folder is a link or holds anything that such a run does not write.
    """
    folders = [folder for folder in (run.checkpoints, run.evaluations, run.videos) if folder.is_dir()]
    files = [run.config, run.metrics, *run.path.glob("events.out.tfevents.*"), *run.videos.glob("*.mp4"), run.best]
    files += [path for folder in (run.path, *folders) for path in folder.glob(".*.tmp")]
    entries = {path for folder in (run.path, *folders) for path in folder.iterdir()} - {run.path / LOCK_FILE}
    if entries <= {*files, *folders} and not any(folder.is_symlink() for folder in folders):
        lock = RunLock(run.path)  # raises if another process has just started it
        for path in files:
            path.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()
        lock.release()


def _train(make: Callable[..., Trainer], world: World, stop: Stop, console: Console) -> int:
    stop.quiet = world.size > 1
    with stop, _make_trainer(make, world, console) as trainer:
        assert trainer.run is not None
        if trainer.writer is not None:
            typed = shlex.join(sys.argv)
            trainer.writer.write_tensorboard(lambda board: board.text("command", typed, trainer.env_steps))
        _print_start(trainer, console)
        stop.may_abort = trainer.snapshot.may_drop
        sizes = {"batch_size": trainer.batch_size, "num_iterations": trainer.num_iterations}
        display = Display(trainer.config.total_steps, console, **sizes)
        try:
            with display.live:
                code = _iterate(trainer, display, stop, world)
            path = trainer.save() if code else None
        except IterationAborted:
            code, path = stop.code(), trainer.snapshot.save(trainer)
        if code:
            newest = "a checkpoint could not be written, so the newest is an older one"
            say(console, f"stopped; {newest if path is None else f'checkpoint: {path}'}")
            say(console, f"go on with: {_command_line('train', f'--resume {trainer.run.path}')}")
            return code
        code = _finish(trainer, trainer.run, stop, console) if world.rank == 0 else 0
        return world.gather_json(code)[0]  # the other ranks wait here for rank 0


def _iterate(trainer: Trainer, display: Display, stop: Stop, world: World) -> int:
    """Train until the end, a signal or the end of the time budget, and return the exit code."""
    for report in trainer:
        display.update(report)
        # The largest of all ranks, so that a signal to any stops all after the same iteration.
        code = world.largest(stop.code(ahead=1.5 * report.scalars["time/iteration_seconds"]))
        if code and report.env_steps < trainer.config.total_steps:
            return code
    return 0


def _make_trainer(make: Callable[..., Trainer], world: World, console: Console) -> Trainer:
    """Make the trainer, with a progress bar while environments replay their episodes."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("back into the environments' episodes", visible=False)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=True)

        return make(world=world, progress=progress, callbacks=[RecordVideos()])


def _print_start(trainer: Trainer, console: Console) -> None:
    config, spec = trainer.config, trainer.envs.spec
    parameters = sum(p.numel() for p in trainer.agent.parameters())
    ranks = f" on each of {trainer.world.size} ranks" if trainer.world.size > 1 else ""
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    say(
        console,
        f"{spec.env_id}: {config.env.num_envs} environments {trainer.envs.where}{ranks}\n"
        f"{config.core.kind} agent of {parameters:,} parameters in {config.precision} on {trainer.device}{threads}",
    )
    if trainer.device.type == "cpu" and config.precision == "float32" and has_fast_bfloat16():
        say(console, "this CPU has bfloat16 arithmetic: --precision bfloat16 is faster")
    for note in trainer.notes:
        say(console, note)
    trainer.notes.clear()
    resumed = f"going on after {trainer.iteration:,} iterations: " if trainer.iteration else ""
    left = f"{trainer.num_iterations - trainer.iteration:,} iterations of {trainer.batch_size:,} steps"
    say(console, f"{resumed}{left}; run folder: {trainer.run and trainer.run.path}")


def _finish(trainer: Trainer, run: RunDir, stop: Stop, console: Console) -> int:
    """Evaluate the trained agent with its memory and without; save and print the result."""
    checkpoint = run.checkpoint(trainer.iteration)
    evaluation = evaluate_with_progress(trainer.evaluate, "held-out levels", stop, console)
    wiped = None
    if trainer.agent.core.state_size and not stop.code():
        forgetful = partial(trainer.evaluate, forget_every=1)
        wiped = evaluate_with_progress(forgetful, "the same without memory", stop, console)
    if evaluation is None or (trainer.agent.core.state_size and wiped is None):
        again = _command_line("train", f"--resume {run.path}")
        say(console, f"stopped before the evaluation was done; go on with: {again}")
        return stop.code()
    without = None if wiped is None else wiped.measures[wiped.headline].mean
    if trainer.writer is not None:
        # What TensorBoard sorts runs by: the headline as such, then measures by their own names.
        means = {name: e.mean for name, e in evaluation.measures.items()}
        final = {"headline": means[evaluation.headline]}
        final |= {} if without is None else {"headline_without_memory": without}
        final |= {name: means[name] for name in (evaluation.headline, "success") if name in means}
        config = trainer.config.to_dict()
        trainer.writer.write_tensorboard(lambda board: board.hparams(config, final, trainer.env_steps))
    result = {**asdict(evaluation), "headline_without_memory": without}
    save_result(run.evaluations / "final.json", result, checkpoint, trainer.env_steps)
    return _print_finished(run, console)


def _python() -> Path:
    """Return this interpreter's path, relative to the current folder where possible."""
    python = Path(sys.executable)
    return python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python


def _command_line(command: str, arguments: object) -> str:
    """Return a command of this package as it is typed in this folder."""
    script = Path("scripts", f"{command}.py")
    return f"{_python()} {script} {arguments}" if script.is_file() else f"ppo-tbptt {command} {arguments}"


def _print_finished(run: RunDir, console: Console) -> int:
    result = read_evaluation(run.evaluations / "final.json")
    print_evaluation(result, console)
    if (without := result.get("headline_without_memory")) is not None:
        wiped = "with its recurrent state wiped before every step the same agent gets"
        say(console, f"{wiped} {result['headline']} {without:.3f}")
    for title, command in {
        "curves": f"{_python()} -m tensorboard.main --logdir {run.path.parent}",
        "evaluate": _command_line("evaluate", run.path),
        "watch": _command_line("enjoy", f"{run.path} --video episode.mp4"),
        "a MemoryGym task": _command_line("train", "configs/mortar_mayhem_grid.toml"),
    }.items():
        say(console, f"  {title:<17} {command}")
    return 0
