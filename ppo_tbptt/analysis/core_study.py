"""The comparison of recurrent cores: which one remembers what for how long, at equal size, steps and search."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ppo_tbptt.analysis.core_outcomes import Outcome, Score, draw, note, read_score, table_of
from ppo_tbptt.analysis.core_trials import BASE, FLOOR, MEMORY_GYM, SEARCH_LEVELS, TOYS, Task, Trial, search, trials
from ppo_tbptt.analysis.figures import learning_curves
from ppo_tbptt.analysis.groups import by_task, group_runs
from ppo_tbptt.analysis.runs import read_runs
from ppo_tbptt.analysis.study import Results, Study, final_evaluation
from ppo_tbptt.config import Config, ConfigError, CoreConfig
from ppo_tbptt.config.fields import shown
from ppo_tbptt.envs import make_env
from ppo_tbptt.models.cores import CORES, build_core
from ppo_tbptt.models.encoders import Encoder
from ppo_tbptt.run.folder import RunDir


class Cores(Study):
    """The cores on tasks with known answers."""

    folder = Path("runs/cores")
    tasks: ClassVar[Sequence[Task]] = TOYS

    def __init__(self, config: Path | None, overrides: dict[str, str]) -> None:
        for key in ("core.kind", "seed", *(task.key for task in self.tasks)):
            if key in overrides:
                raise ConfigError(f"{key}: {shown(overrides[key])} for all runs, but they differ in it; leave it out")
        self.bases = {task: Config.load(task.config, {**task.overrides, **overrides}) for task in self.tasks}
        self._sizes = {task: CoreSizes(base) for task, base in self.bases.items()}

    @classmethod
    def trials(cls) -> list[Trial]:
        """See :meth:`Study.trials`."""
        return list(trials(cls.tasks))

    def config(self, trial: Trial, folder: Path) -> Config:
        """See :meth:`Study.config`."""
        task, base = trial.task, self.bases[trial.task]
        changes: dict[str, Any] = {"core.kind": trial.core, "seed": trial.seed}
        if trial.length is not None:
            changes[task.key] = trial.length
        if trial.rate is not None:
            changes |= {**task.search, "train.eval_first_seed": SEARCH_LEVELS}
        if trial.core != FLOOR:
            changes["core.hidden_size"] = self._sizes[task].matched(trial.core)
            schedule = base.ppo.learning_rate
            rate = best_rate(folder, task, trial.core) if trial.rate is None else trial.rate
            changes["ppo.learning_rate.initial"] = schedule.initial * rate
            if schedule.final is not None:
                changes["ppo.learning_rate.final"] = schedule.final * rate
        return base.override(changes)

    def results(self, folder: Path) -> Results | None:
        """See :meth:`Study.results`."""
        outcomes = self._read(folder)
        if not outcomes:
            return None
        comparisons = len(self.tasks) * (len(CORES) - 2)
        outcomes = [outcome.compared_with(outcomes, comparisons) for outcome in outcomes]
        return Results(
            tables=dict(table_of(task, of) for task in self.tasks if (of := [o for o in outcomes if o.task is task])),
            note=note(comparisons),
            tree=[outcome.to_dict() for outcome in outcomes],
            figure=self.draw(outcomes, folder),
        )

    def draw(self, outcomes: Sequence[Outcome], folder: Path) -> Figure:
        """Draw scores over the lengths."""
        return draw(outcomes)

    def _read(self, folder: Path) -> list[Outcome]:
        """Read the finished runs: an outcome for each task and core that has one."""
        scores: dict[tuple[Task, str], dict[int | None, dict[int, Score]]] = {}
        configs: dict[tuple[Task, str], Config] = {}
        for trial in self.trials():
            if trial.rate is None and final_evaluation(folder, trial).is_file():
                of = trial.task, trial.core
                configs.setdefault(of, Config.load(RunDir(folder / trial.name).config))
                scores.setdefault(of, {}).setdefault(trial.length, {})[trial.seed] = read_score(folder, trial)
        return [
            Outcome(
                task=task,
                core=core,
                hidden_size=hidden_size(configs[task, core]),
                parameters=self._sizes[task].parameters(configs[task, core]),
                learning_rate=configs[task, core].ppo.learning_rate.initial,
                search={} if core == FLOOR else read_search(folder, task, core),
                scores=by_length,
            )
            for (task, core), by_length in sorted(scores.items(), key=self._place)
        ]

    def _place(self, item: tuple[tuple[Task, str], Any]) -> tuple[int, int]:
        """Where an outcome stands: by task, then by core."""
        return self.tasks.index(item[0][0]), list(CORES).index(item[0][1])


class CoresOnMemoryGym(Cores):
    """The cores on MemoryGym. The figure shows learning curves over steps and over time, to compare at equal ones."""

    folder = Path("runs/cores_memory_gym")
    tasks = MEMORY_GYM

    def draw(self, outcomes: Sequence[Outcome], folder: Path) -> Figure:
        """Draw the learning curves of all finished runs."""
        finished = [
            trial for trial in self.trials() if trial.rate is None and final_evaluation(folder, trial).is_file()
        ]
        return learning_curves(by_task(group_runs(read_runs([folder / trial.name for trial in finished]))))


# --- sizes and learning rates ----------------------------------------------------------------------------------------


class CoreSizes:
    """Sizes at which all cores of a config have about as many parameters as its GRU."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._matched: dict[str, int] = {}

    @cached_property
    def _input_size(self) -> int:
        env, model = self._config.env, self._config.model
        task = make_env(env.id, options=env.options, previous=model.previous)
        task.close()
        return Encoder({key: array.shape for key, array in task.spec.obs.items()}, model).output_size

    def parameters(self, config: Config) -> int:
        """Count the parameters of a config's core: its weights by input and by state, and what lies around it."""
        return sum(parameter.numel() for parameter in build_core(self._input_size, config.core).parameters())

    def matched(self, kind: str) -> int:
        """Return the hidden size, a multiple of 8, whose number of parameters is nearest to that of the config's GRU.

        It is at most 8 times the GRU's.
        """
        if kind not in self._matched:

            def parameters(size: int, kind: str = kind) -> int:
                return self.parameters(self._config.override({"core.kind": kind, "core.hidden_size": size}))

            own = hidden_size(self._config)
            wanted, sizes = parameters(own, BASE), range(8, 8 * own + 1, 8)
            at = bisect_left(sizes, wanted, key=parameters)
            nearest = min(sizes[max(0, at - 1) : at + 1], key=lambda size: abs(parameters(size) - wanted))
            self._matched[kind] = own if kind == BASE else nearest
        return self._matched[kind]


def hidden_size(config: Config) -> int:
    """Return that of a built-in core."""
    assert isinstance(config.core, CoreConfig)
    return config.core.hidden_size


def read_search(folder: Path, task: Task, core: str) -> dict[float, float]:
    """Read the score at each factor on the learning rate that is finished."""
    finished = [trial for trial in search(task, core) if final_evaluation(folder, trial).is_file()]
    return {trial.rate: read_score(folder, trial).mean for trial in finished if trial.rate is not None}


def best_rate(folder: Path, task: Task, core: str) -> float:
    """Return the factor with the best score, of equal ones the first of ``RATES``."""
    found = read_search(folder, task, core)
    return max(found, key=found.__getitem__)
