"""``ablate``: train the runs of a study, those that are not finished yet, and draw what they show."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_tbptt.analysis.ablation import WaysThroughTime
from ppo_tbptt.analysis.core_study import Cores, CoresOnMemoryGym
from ppo_tbptt.analysis.figures import save
from ppo_tbptt.analysis.study import Results, Study, Trial, final_evaluation
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
from ppo_tbptt.ppo.learner import NonFiniteError
from ppo_tbptt.run.files import replacing, write_text
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.training.trainer import Trainer

STUDIES: Mapping[str, type[Study]] = {
    "time": WaysThroughTime,
    "cores": Cores,
    "cores_memory_gym": CoresOnMemoryGym,
}


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "ablate",
        "Train the runs of a study, and tell what they show. time: ways to train through time on a task with a known "
        "answer: which sequence length reaches which delay, and what burn-in, refresh, overlapping sequences and the "
        "like change; another config of that task may stand in its place. cores: all recurrent cores of about as many "
        "parameters on three tasks with known answers over length, each with the best of three learning rates. "
        "cores_memory_gym: the same on Mortar Mayhem and Mystery Path (days). Runs that are finished are not run "
        "again, and interrupted ones go on, so that the same command may be given again and again.",
        "Every field of the config can be set for all runs, as for train. Table (.md, .json) and figure (.png) go to "
        "the same folder, also of part of the runs.",
    )
    studies = ", ".join(STUDIES)
    parser.add_argument("study", metavar="STUDY_OR_CONFIG", help=f"{studies}, or configs/toy_delayed_choice.toml")
    parser.option("--out", type=Path, help="folder of the runs (default: runs/ablate, for cores runs/cores, ...)")
    parser.option("--only", default="", metavar="TEXT", help="only runs with this in their name, such as lstm_delay7")
    parser.option("--jobs", type=integer_from(0), help="runs side by side, one thread each (default: one per core)")
    parser.option("--draw-only", action="store_true", help="train nothing")
    args, overrides = parser.parse_with_overrides(argv)
    name, config = (args.study, None) if args.study in STUDIES else ("time", Path(args.study))
    folder: Path = args.out or STUDIES[name].folder
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is a file; must be a folder, or not exist yet")
    study = STUDIES[name](config, overrides)
    chosen = _chosen(study.trials(), args.only)
    for trial in chosen:
        if _is_ready(trial, folder):
            _check_same(RunDir(folder / trial.name), study.config(trial, folder))
    waiting = [trial for trial in chosen if not final_evaluation(folder, trial).is_file()]
    console = wide_console()
    done = len(chosen) - len(waiting)
    code = 0
    if waiting and not args.draw_only:
        say(console, f"{len(chosen)} runs, {done} of them finished before; folder: {folder}")
        jobs = resolve_workers("auto", len(waiting)) if args.jobs is None else args.jobs
        progress = Progress(done, len(chosen), max(1, jobs), console)
        with Stop(quiet=True) as stop:
            code = _train_all(name, study, waiting, folder, jobs, progress, stop)
    results = study.results(folder)
    if results is None:
        say(console, "no run is finished yet, so there is nothing to draw")
    else:
        _write(results, folder, console)
    return code


def _chosen(trials: Sequence[Trial], text: str) -> list[Trial]:
    """Return the runs with ``text`` in their name, and those that they need, in their order.

    Raises:
        UsageError: there are none.
    """
    chosen = [trial for trial in trials if text in trial.name]
    if not chosen:
        raise UsageError(f"--only {text}: no run has this in its name; they are like {trials[0].name}")
    wanted = {other.name for trial in chosen for other in (trial, *trial.needs())}
    return [trial for trial in trials if trial.name in wanted]


def _is_ready(trial: Trial, folder: Path) -> bool:
    """Whether the runs that decide the config of this one are finished."""
    return all(final_evaluation(folder, other).is_file() for other in trial.needs())


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
        result = read_evaluation(final_evaluation(folder, trial))
        score = result["measures"][result["headline"]]
        text = f"{trial.name}: {result['headline']} {interval(score['mean'], score['ci95'])} in {seconds:.0f} s"
        say(self.console, f"{text}; {self.done} of {self.total} done, {left / 60:.0f} minutes left")


def _train_all(
    name: str, study: Study, waiting: Sequence[Trial], folder: Path, jobs: int, progress: Progress, stop: Stop
) -> int:
    """Train so many runs at a time, each in a process of its own (0: one after the other in this one).

    Returns the exit code: that of the signal that came, or 1 if a run failed, also where others needed it.
    """
    queue, by_name, codes = list(waiting), {trial.name: trial for trial in waiting}, []

    def next_job() -> Job | None:
        trial = next((trial for trial in queue if _is_ready(trial, folder)), None)
        if trial is None:
            return None
        config = study.config(trial, folder)
        _check_same(RunDir(folder / trial.name), config)
        queue.remove(trial)
        progress.began(trial, progress.total - len(queue))
        return Job(trial.name, [name, trial.name, config.to_dict(), str(folder)])

    def ended(job: Job, seconds: float, code: int) -> None:
        codes.append(code)
        progress.ended(by_name[job.name], folder, seconds, code)

    run_side_by_side(__name__, next_job, jobs, stop, ended=ended)
    if queue and any(codes):
        say(progress.console, f"{len(queue)} runs were not begun, such as {queue[0].name}, which needs one that failed")
    return stop.code() or int(any(codes))


def work(message: Sequence[Any], stop: Stop, ask: Ask) -> int:
    """Train the run that ``message`` names, or go on with it, and evaluate it at its end; return the exit code.

    A run whose loss stays NaN or infinite ends there, and counts with its last finite weights.
    """
    study, name, tree, folder = message[0], message[1], message[2], Path(message[3])
    trial = next(trial for trial in STUDIES[study].trials() if trial.name == name)
    config, path = Config.from_dict(tree), folder / name
    resumes = plan_of(path, go_on=True) == "resume"
    make = partial(Trainer.resume, path) if resumes else partial(Trainer, config, path)
    with make(callbacks=trial.callbacks()) as trainer:
        diverged = {}
        try:
            for report in trainer:
                if (code := stop.code()) and report.env_steps < config.total_steps:
                    trainer.save()
                    return code
        except NonFiniteError as error:
            diverged = {"diverged": str(error)}
        checkpoint = RunDir(path).checkpoint(trainer.iteration)
        result = asdict(trainer.evaluate()) | diverged
        save_result(final_evaluation(folder, trial), result, checkpoint, trainer.env_steps)
    return 0


# --- results -------------------------------------------------------------------------------------------------------


def _write(results: Results, folder: Path, console: Console) -> None:
    """Print the tables, and write them and the figure to the folder."""
    for title, (head, *rows) in results.tables.items():
        table = Table(*head, box=None, padding=(0, 1), title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    write_json(folder / "ablation.json", results.tree)
    write_text(folder / "ablation.md", results.markdown())
    with replacing(folder / "ablation.png") as file:
        save(results.figure, file, "png")
    say(console, f"written to {folder}: ablation.md, ablation.json, ablation.png")
