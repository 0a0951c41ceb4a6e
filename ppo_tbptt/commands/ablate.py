"""``ablate``: train the runs of an ablation, those that are not finished yet, and draw what they show."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_tbptt.analysis.ablation import (
    TASK,
    Outcome,
    Trial,
    draw,
    final_evaluation,
    markdown,
    read_outcomes,
    table_rows,
    trials,
)
from ppo_tbptt.analysis.figures import save
from ppo_tbptt.commands.console import interval, say, wide_console
from ppo_tbptt.commands.parser import Parser, UsageError, integer_from
from ppo_tbptt.commands.results import save_result, write_json
from ppo_tbptt.commands.side_by_side import Ask, Job, run_side_by_side
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.commands.train_run import plan_of
from ppo_tbptt.config import Config
from ppo_tbptt.config.resume import describe_changes
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.files import replacing, write_text
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.training.trainer import Trainer


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "ablate",
        "Ways to train through time, compared on a task with a known answer: which sequence length reaches which "
        "delay, and what burn-in, refresh, overlapping sequences and the like change. Runs that are finished are not "
        "run again, and interrupted ones go on, so that the same command may be given again and again.",
        "Every field of the config can be set for all runs, as for train. Table (.md, .json) and figure (.png) go to "
        "the same folder, also of part of the runs.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="configs/toy_delayed_choice.toml")
    parser.option("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs (default: runs/ablate)")
    parser.option("--only", default="", metavar="TEXT", help="only runs with this in their name, such as lstm_delay7")
    parser.option("--jobs", type=integer_from(0), help="runs side by side, one thread each (default: one per core)")
    parser.option("--draw-only", action="store_true", help="train nothing")
    args, overrides = parser.parse_with_overrides(argv)
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: is a file; must be a folder, or not exist yet")
    base = Config.load(args.config, overrides)
    if base.env.id != TASK:
        raise UsageError(f"{args.config}: env.id = {base.env.id!r} has no delay to vary; must be {TASK!r}")
    chosen = [trial for trial in trials() if args.only in trial.name]
    if not chosen:
        raise UsageError(f"--only {args.only}: no run has this in its name; they are like {trials()[0].name}")
    configs = {trial: trial.config(base) for trial in chosen}
    for trial, config in configs.items():
        _check_same(RunDir(args.out / trial.name), config)
    waiting = [trial for trial in chosen if not final_evaluation(args.out, trial).is_file()]
    console = wide_console()
    done = len(chosen) - len(waiting)
    code = 0
    if waiting and not args.draw_only:
        say(console, f"{len(chosen)} runs, {done} of them finished before; folder: {args.out}")
        jobs = resolve_workers("auto", len(waiting)) if args.jobs is None else args.jobs
        with Stop(quiet=True) as stop:
            code = _train_all(
                waiting, configs, args.out, jobs, Progress(done, len(chosen), max(1, jobs), console), stop
            )
    outcomes = read_outcomes(args.out)
    if outcomes:
        _write(outcomes, args.out, console)
    else:
        say(console, "no run is finished yet, so there is nothing to draw")
    return code


def _check_same(run: RunDir, config: Config) -> None:
    """Check that the run, if it exists, was begun with ``config``.

    Raises:
        UsageError: it was not.
    """
    if run.config.is_file():
        saved = Config.load(run.config)
        resolved = config.replace(precision=saved.precision) if config.precision == "auto" else config
        if changes := describe_changes(saved, resolved):
            raise UsageError(f"{run.path}: begun with other settings ({changes[0]}); choose another folder with --out")


# --- training ------------------------------------------------------------------------------------------------------


class Progress:
    """Prints what begins, what has come of it, and how much time is left."""

    def __init__(self, done: int, total: int, jobs: int, console: Console) -> None:
        self.done, self.total, self.jobs, self.console = done, total, jobs, console
        self.seconds: list[float] = []

    def began(self, trial: Trial, number: int) -> None:
        """Print that the run ``number`` (from 1) of all begins."""
        say(self.console, f"run {number} of {self.total}: {trial.name}")

    def ended(self, trial: Trial, folder: Path, seconds: float, code: int) -> None:
        """Print the outcome of a run that took so many seconds, and the time that those left may take."""
        if code:
            say(self.console, f"{trial.name}: ended with exit code {code}")
            return
        self.done += 1
        self.seconds.append(seconds)
        left = sum(self.seconds) / len(self.seconds) * (self.total - self.done) / self.jobs
        success = read_evaluation(final_evaluation(folder, trial))["measures"]["success"]
        text = f"{trial.name}: success {interval(success['mean'], success['ci95'])} in {seconds:.0f} s"
        say(self.console, f"{text}; {self.done} of {self.total} done, {left / 60:.0f} minutes left")


def _train_all(
    waiting: Sequence[Trial], configs: dict[Trial, Config], folder: Path, jobs: int, progress: Progress, stop: Stop
) -> int:
    """Train so many runs at a time, each in a process of its own (0: one after the other in this one).

    Returns the exit code: that of the signal that came, or 1 if a run failed.
    """
    queue, by_name, codes = list(waiting), {trial.name: trial for trial in waiting}, []

    def next_job() -> Job | None:
        if not queue:
            return None
        trial = queue.pop(0)
        progress.began(trial, progress.total - len(queue))
        return Job(trial.name, [trial.name, configs[trial].to_dict(), str(folder)])

    def ended(job: Job, seconds: float, code: int) -> None:
        codes.append(code)
        progress.ended(by_name[job.name], folder, seconds, code)

    run_side_by_side(__name__, next_job, jobs, stop, ended=ended)
    return stop.code() or int(any(codes))


def work(message: Sequence[Any], stop: Stop, ask: Ask) -> int:
    """Train the run that ``message`` names, or go on with it, and evaluate it at its end; return the exit code."""
    name, tree, folder = message[0], message[1], Path(message[2])
    trial, config, path = next(trial for trial in trials() if trial.name == name), Config.from_dict(tree), folder / name
    resumes = plan_of(path, go_on=True) == "resume"
    make = partial(Trainer.resume, path) if resumes else partial(Trainer, config, path)
    with make(callbacks=trial.callbacks()) as trainer:
        for report in trainer:
            if (code := stop.code()) and report.env_steps < config.total_steps:
                trainer.save()
                return code
        checkpoint = RunDir(path).checkpoint(trainer.iteration)
        save_result(final_evaluation(folder, trial), asdict(trainer.evaluate()), checkpoint, trainer.env_steps)
    return 0


# --- results -------------------------------------------------------------------------------------------------------


def _write(outcomes: Sequence[Outcome], folder: Path, console: Console) -> None:
    """Print the table, and write it and the figure to the folder."""
    head, *rows = table_rows(outcomes)
    table = Table(*head, box=None, padding=(0, 1))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    write_json(folder / "ablation.json", [outcome.to_dict() for outcome in outcomes])
    write_text(folder / "ablation.md", markdown(outcomes))
    with replacing(folder / "ablation.png") as file:
        save(draw(outcomes), file, "png")
    say(console, f"written to {folder}: ablation.md, ablation.json, ablation.png")
