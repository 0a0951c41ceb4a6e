"""The study behind ``tune``: what is tried next, what is stopped early, and what has come of it."""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from rich.table import Table
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from ppo_tbptt.analysis.figures import save
from ppo_tbptt.analysis.tuning import CI95, draw, importances, markdown, name_of, ranked, row_of, short, table_rows
from ppo_tbptt.commands.console import interval, say, wide_console
from ppo_tbptt.commands.parser import UsageError
from ppo_tbptt.commands.search_space import Space
from ppo_tbptt.commands.side_by_side import Job, run_side_by_side
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.config.resume import describe_changes
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.files import replacing, write_text
from ppo_tbptt.run.folder import RunDir, RunLock
from ppo_tbptt.runtime.errors import RunError

BEGUN_WITH, PRUNED_AT, REFUSED = "begun_with", "pruned_at", "refused"
"""Attributes: of the study, its settings; of a trial, the steps at which it was told to end, and why it never began."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
DRAWS = 100
"""Combinations in a row that the config may refuse."""
PRINTED = 20
"""Rows of the table on the console."""


def tune(args: Namespace, config: Config, space: Space, headline: str) -> int:
    """Do what ``tune``'s arguments ask for; return the exit code."""
    with _storage(args.out) as storage:
        search = Search(_study(args, config, space, storage), config, space, headline, args)
        with Stop(minutes=args.minutes, quiet=True) as stop:
            code = search.run(stop)
        search.print_results()
    return code


@contextmanager
def _storage(folder: Path) -> Iterator[RDBStorage]:
    """Open ``study.db`` in the folder, which is kept for this process alone.

    Raises:
        UsageError: it is no study's file.
        RunDirError: the folder can't be written, or another process is at it.
        RunError: the file can't be written any more.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    lock, file = RunLock(folder), folder / "study.db"
    try:
        # A URL by hand would be cut at a question mark; optuna formats it.
        url = URL.create("sqlite", database=str(file)).render_as_string()
        storage = RDBStorage(url.replace("{", "{{").replace("}", "}}"))
    except (SQLAlchemyError, StorageInternalError, RuntimeError) as error:
        lock.release()
        raise UsageError(
            f"{file}: no study of optuna ({_first_line(error)}); choose another folder with --out"
        ) from error
    try:
        yield storage
    except (SQLAlchemyError, StorageInternalError) as error:
        raise RunError(f"{file}: {_first_line(error.__cause__ or error)}; go on with the same command") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()
        lock.release()


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _study(args: Namespace, config: Config, space: Space, storage: RDBStorage) -> optuna.Study:
    """Create the study, or load it.

    Raises:
        UsageError: it was begun with other settings.
    """
    first = args.prune_from or max(1, config.total_steps // 8)
    # Rather than Hyperband, whose brackets share the trials among them and learn apart: there are too few for that.
    pruner = SuccessiveHalvingPruner(min_resource=first, reduction_factor=2)
    study = optuna.create_study(
        storage=storage, study_name="tune", load_if_exists=True, direction="maximize", pruner=pruner
    )
    settings = {"config": config.to_dict(), "space": space.tree, "seed": args.seed, "prune_from": first}
    before = study.user_attrs.get(BEGUN_WITH)
    if before is None:
        study.set_user_attr(BEGUN_WITH, settings)
        return study
    changes = describe_changes(Config.from_dict(before["config"], f"{args.out}/study.db"), config)
    was, now = (
        {**tree["space"], "--seed": tree["seed"], "--prune-from": tree["prune_from"]} for tree in (before, settings)
    )
    changes += [f"{key}: {was.get(key)} -> {now.get(key)}" for key in {**was, **now} if was.get(key) != now.get(key)]
    if changes:
        raise UsageError(f"{args.out}: begun with other settings ({changes[0]}); choose another folder with --out")
    return study


class Search:
    """Trains trials until there are enough, and writes what has come of them after each."""

    def __init__(self, study: optuna.Study, base: Config, space: Space, headline: str, args: Namespace) -> None:
        self.study, self.base, self.space, self.headline = study, base, space, headline
        self.folder, self.total, self.seed, self.source = args.out, args.trials, args.seed, args.space
        self.jobs, self.console = args.jobs, wide_console()
        self.failed = False
        self._trials: dict[str, Trial] = {}
        self._steps: dict[str, int] = {}  # of the last evaluation that the study knows
        self._seconds: list[float] = []

    def run(self, stop: Stop) -> int:
        """Train what is missing; return the exit code: that of the stop, or 1 if a trial failed."""
        missing = self.total - self._done()
        if missing > 0:
            for frozen in self._interrupted():
                RunLock(self.folder / name_of(frozen.number)).release()  # raises if a process of before is still at it
            jobs = resolve_workers("auto", missing) if self.jobs is None else self.jobs
            side_by_side = f"{max(1, jobs)} side by side" if jobs else "in this process"
            say(self.console, f"{self.total} trials, {self.total - missing} of them done before, {side_by_side}")
            say(self.console, f"folder: {self.folder}; measure: {self.headline} on held-out levels")
            queue = self._to_train(missing)

            def next_job() -> Job | None:
                trial = next(queue, None)
                return None if trial is None else self._begin(trial)

            def ended(job: Job, seconds: float, code: int) -> None:
                self._end(job.name, seconds, code, jobs, stop)

            run_side_by_side("ppo_tbptt.commands.tune_trial", next_job, jobs, stop, ended=ended, answer=self._answer)
        return (stop.code() if self._done() < self.total else 0) or int(self.failed)

    # --- trials -----------------------------------------------------------------------------------------------------

    def _to_train(self, missing: int) -> Iterator[Trial]:
        """Yield interrupted trials, then new ones."""
        for frozen in self._interrupted()[:missing]:
            self._reseed(frozen.number)
            trial = Trial(self.study, frozen._trial_id)
            if self._accepts(trial):
                self._steps[name_of(trial.number)] = -1 if frozen.last_step is None else frozen.last_step
                missing -= 1
                yield trial
        for _ in range(missing):
            yield self._draw()

    def _draw(self) -> Trial:
        refused = ""
        for _ in range(DRAWS):
            self._reseed(len(self.study.get_trials(deepcopy=False)))
            trial = self.study.ask()
            if self._accepts(trial):
                return trial
            refused = trial.user_attrs[REFUSED]
        raise UsageError(f"{self.source}: {DRAWS} combinations in a row don't go together, such as the last: {refused}")

    def _reseed(self, number: int) -> None:
        """Let a trial's values depend on its number and those before it alone, not on interruptions."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        self.study.sampler = TPESampler(seed=int(seed))

    def _accepts(self, trial: Trial) -> bool:
        """Draw the trial's values; a combination that the config refuses ends the trial."""
        self.space.suggest(trial)
        try:
            self._config(trial.params)
        except ConfigError as error:
            trial.set_user_attr(REFUSED, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return False
        return True

    def _config(self, drawn: dict[str, Any]) -> Config:
        return self.base.override(self.space.overrides(drawn))

    def _begin(self, trial: Trial) -> Job:
        name = name_of(trial.number)
        goes_on = name in self._steps
        self._steps.setdefault(name, -1)
        self._trials[name] = trial
        say(self.console, f"{name} {'goes on' if goes_on else 'begins'}: {_listed(trial.params)}")
        config = self._config(trial.params)
        if config.env.num_workers == "auto":
            config = config.replace(env={"num_workers": 0})  # a core of its own is all that a trial has
        return Job(name, [str(self.folder / name), config.to_dict()])

    def _answer(self, job: Job, question: Sequence[float]) -> bool:
        """Note an evaluation, and tell whether the trial is pruned there."""
        trial, env_steps, value = self._trials[job.name], int(question[0]), question[1]
        if env_steps > self._steps[job.name]:
            trial.report(value, env_steps)
            self._steps[job.name] = env_steps
        pruned_at = trial.user_attrs.get(PRUNED_AT)
        if pruned_at is None and env_steps == self._steps[job.name] and trial.should_prune():
            trial.set_user_attr(PRUNED_AT, pruned_at := env_steps)
        return pruned_at is not None and env_steps >= pruned_at

    def _end(self, name: str, seconds: float, code: int, jobs: int, stop: Stop) -> None:
        trial = self._trials.pop(name)
        if code:
            self.failed = True
            if code > 0:  # by itself, as where the loss is NaN again and again; what was killed goes on next time
                self.study.tell(trial, state=TrialState.FAIL)
            say(self.console, f"{name}: ended with exit code {code}")
            return
        if PRUNED_AT in trial.user_attrs:
            frozen = self.study.tell(trial, state=TrialState.PRUNED)
        else:
            result = read_evaluation(RunDir(self.folder / name).evaluations / "final.json")
            measure = result["measures"][result["headline"]]
            if result["env_steps"] > self._steps[name]:
                trial.report(measure["mean"], result["env_steps"])
            trial.set_user_attr(CI95, measure["ci95"])
            frozen = self.study.tell(trial, measure["mean"])
        self._seconds.append(seconds)
        self.write_results()
        self._print_end(frozen, seconds, jobs, stop)

    def _print_end(self, trial: FrozenTrial, seconds: float, jobs: int, stop: Stop) -> None:
        done, best = self._done(), self._best()
        row = row_of(trial)
        text = f"{row['trial']}: {row['state']} with {self.headline} {interval(row['value'], row['ci95'])}"
        text += f" after {row['env_steps']:,} steps, in {seconds:.0f} s"
        if best is not None:
            text += f"; best {best.value:.3f} ({name_of(best.number)})"
        left = sum(self._seconds) / len(self._seconds) * max(0, self.total - done) / max(1, jobs)
        left = min(left, max(0.0, stop.deadline - monotonic()))
        say(self.console, f"{text}; {done} of {self.total} done, {left / 60:.0f} minutes left")

    # --- results ----------------------------------------------------------------------------------------------------

    def _done(self) -> int:
        return len(self.study.get_trials(deepcopy=False, states=DONE))

    def _interrupted(self) -> list[FrozenTrial]:
        return self.study.get_trials(states=(TrialState.RUNNING,))

    def _shown(self) -> list[FrozenTrial]:
        """Return all trials but those that never began."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if REFUSED not in trial.user_attrs]

    def _best(self) -> FrozenTrial | None:
        finished = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return ranked(finished)[0] if finished else None

    def write_results(self) -> None:
        """Write the table and the best config."""
        trials, best, keys = self._shown(), self._best(), list(self.space.tree)
        held_out = self.base.train
        levels = f"{held_out.eval_first_seed} to {held_out.eval_first_seed + held_out.eval_num_seeds - 1}"
        note = f"{self.headline} on the level seeds {levels}, which chose the best trial: report the result on others."
        write_text(self.folder / "tune.md", markdown(trials, keys, self.headline, note))
        tree = {
            "headline": self.headline,
            "best": None if best is None else name_of(best.number),
            "importances": importances(trials),
            "trials": [row_of(trial) for trial in trials],
        }
        write_text(self.folder / "tune.json", json.dumps(tree, indent=1))
        if best is not None:
            row = row_of(best)
            value = f"{self.headline} {interval(row['value'], row['ci95'])}"
            comment = [
                f"The best of {self._done()} trials: {row['trial']}, {value} after {row['env_steps']:,} steps",
                f"on the level seeds {levels}. They chose it, so report its result on others:",
                "ppo-tbptt evaluate RUN --first-seed 200000",
                *(f"{key}: {value}" for key, value in best.params.items()),
            ]
            lines = "".join(f"# {line}\n" for line in comment)
            write_text(self.folder / "best.toml", f"{lines}\n{self._config(best.params).to_toml()}")

    def print_results(self) -> None:
        """Print the table, and write all files."""
        trials, keys = self._shown(), list(self.space.tree)
        if not trials:
            say(self.console, "no trial has begun")
            return
        self.write_results()
        head, *rows = table_rows(trials, keys, self.headline)
        if not self.console.is_terminal:
            self.console.width += 16 * len(keys)
        table = Table(*(name.replace(".", "\n") for name in head), box=None, padding=(0, 1))
        for row in rows[:PRINTED]:
            table.add_row(*row)
        self.console.print(table)
        if len(rows) > PRINTED:
            say(self.console, f"{len(rows) - PRINTED} more are in tune.md")
        files = ["study.db", "tune.md", "tune.json"]
        if shares := importances(trials):
            title = f"{self.headline} of {self._done()} trials: which parameters decide"
            with replacing(self.folder / "importances.png") as file:
                save(draw(shares, title), file, "png")
            files.append("importances.png")
        else:
            say(self.console, "too few different results yet to tell which parameters matter")
        if self._best() is not None:
            files.append("best.toml")
        say(self.console, f"written to {self.folder}: {', '.join(files)}")
        if self._best() is not None:
            say(self.console, f"  train the best  ppo-tbptt train {self.folder / 'best.toml'}")


def _listed(drawn: dict[str, Any]) -> str:
    return ", ".join(f"{key} {short(value)}" for key, value in drawn.items())
