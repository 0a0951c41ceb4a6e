"""What the comparison of recurrent cores shows, as table and figure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_tbptt.analysis.core_trials import BASE, FLOOR, RATES, Task, Trial
from ppo_tbptt.analysis.figures import COLOURS, DASHES, MARKERS, WIDTH
from ppo_tbptt.analysis.study import SIGNIFICANT, final_evaluation
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.evaluation.statistics import least_stratified_p, mean_over_runs, stratified_permutation_p
from ppo_tbptt.models.cores import CORES
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import read_metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The headline measure of one run on held-out levels.

    ci95: over levels.
    seconds: of training, evaluations on the way included.
    """

    mean: float
    ci95: tuple[float, float] | None
    env_steps: int
    seconds: float
    diverged: bool


def read_score(folder: Path, trial: Trial) -> Score:
    """Read what a finished run leaves.

    Raises:
        JsonError, MetricsError: a file is broken.
    """
    tree = read_evaluation(final_evaluation(folder, trial))
    measure = tree["measures"][tree["headline"]]
    metrics = RunDir(folder / trial.name).metrics
    rows = read_metrics(metrics) if metrics.is_file() else []  # diverged in its first iteration
    return Score(
        mean=measure["mean"],
        ci95=measure["ci95"] and (measure["ci95"][0], measure["ci95"][1]),
        env_steps=tree["env_steps"],
        seconds=sum(row.get("time/iteration_seconds", 0.0) + row.get("time/evaluation_seconds", 0.0) for row in rows),
        diverged="diverged" in tree,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the runs of a core on a task show.

    learning_rate: at the first step.
    search: score at each factor on the learning rate.
    scores: by length, then by seed.
    p_value: of the difference to GRU over all lengths: of a permutation test over runs that deals those of each length
        among themselves, times the number of comparisons (Bonferroni). None: not compared, or no runs to compare.
    least_p: the least value that so many runs can give.
    """

    task: Task
    core: str
    hidden_size: int
    parameters: int
    learning_rate: float
    search: dict[float, float]
    scores: dict[int | None, dict[int, Score]]
    p_value: float | None = None
    least_p: float = 1.0
    better: bool = False

    def at(self, length: int | None) -> tuple[float, tuple[float, float] | None] | None:
        """Return mean and 95 % interval at a length: over runs, of a single one over levels; None without runs."""
        runs = list(self.scores.get(length, {}).values())
        if not runs:
            return None
        estimate = mean_over_runs([run.mean for run in runs])
        return estimate.mean, estimate.ci95 if len(runs) > 1 else runs[0].ci95

    @property
    def seconds(self) -> float:
        """Median time of training a run."""
        return median(run.seconds for runs in self.scores.values() for run in runs.values())

    @property
    def env_steps(self) -> int:
        """Steps of a run."""
        return max(run.env_steps for runs in self.scores.values() for run in runs.values())

    def compared_with(self, outcomes: Sequence["Outcome"], comparisons: int) -> "Outcome":
        """Add how this core compares to GRU on its task, as one of so many comparisons."""
        base = next((other for other in outcomes if other.task is self.task and other.core == BASE), None)
        if base is None or self.core in (BASE, FLOOR):
            return self
        strata = [
            ([run.mean for run in own.values()], [run.mean for run in others.values()])
            for length, own in self.scores.items()
            if (others := base.scores.get(length))
        ]
        if not strata:
            return self
        p_value = min(1.0, stratified_permutation_p(strata) * comparisons)
        least_p = least_stratified_p(strata) * comparisons
        better = sum(fmean(own) - fmean(others) for own, others in strata) > 0
        return replace(self, p_value=p_value, least_p=least_p, better=better)

    @property
    def verdict(self) -> str:
        """Say how this core compares to GRU."""
        if self.core in (BASE, FLOOR):
            return "-"
        if self.p_value is None or self.least_p >= SIGNIFICANT:
            return "too few runs"
        shown = f"{'better' if self.better else 'worse'}, p = {self.p_value:.3f}"
        return shown if self.p_value < SIGNIFICANT else "not shown"

    def to_dict(self) -> dict[str, Any]:
        """Convert to what the JSON file holds."""
        lengths = []
        for length, runs in self.scores.items():
            estimate = self.at(length)
            assert estimate is not None
            by_seed = {seed: asdict(run) for seed, run in runs.items()}
            lengths.append({"length": length, "score": estimate[0], "ci95": estimate[1], "by_seed": by_seed})
        return {
            "task": self.task.name,
            "core": self.core,
            "hidden_size": self.hidden_size,
            "parameters": self.parameters,
            "learning_rate": self.learning_rate,
            "search": self.search,
            "lengths": lengths,
            "p_value": self.p_value,
            "env_steps": self.env_steps,
            "seconds": self.seconds,
        }


# --- table -----------------------------------------------------------------------------------------------------------


def table_of(task: Task, outcomes: Sequence[Outcome]) -> tuple[str, list[tuple[str, ...]]]:
    """Return the title of a task's table; then its head, and a row for each core."""
    lengths = task.lengths or (None,)
    names = [f"{task.label} {length}" if length is not None else "score" for length in lengths]
    rows = [("core", "size", "parameters", "rate", *names, f"than {BASE}", "minutes")]
    for outcome in outcomes:
        size = "-" if outcome.core == FLOOR else str(outcome.hidden_size)
        what = outcome.core, size, f"{outcome.parameters:,}", f"{outcome.learning_rate:.2g}"
        scores = [_cell(outcome, length) for length in lengths]
        rows.append((*what, *scores, outcome.verdict, f"{outcome.seconds / 60:.1f}"))
    chance = "" if task.chance is None else f"; {task.chance:.2f} by chance"
    return f"{task.title}, {max(outcome.env_steps for outcome in outcomes):,} steps{chance}", rows


def _cell(outcome: Outcome, length: int | None) -> str:
    estimate = outcome.at(length)
    if estimate is None:
        return "-"
    mean, ci95 = estimate
    diverged = sum(run.diverged for run in outcome.scores[length].values())
    note = f", {diverged} diverged" if diverged else ""
    return f"{mean:.2f}{note}" if ci95 is None else f"{mean:.2f} ({ci95[0]:.2f} to {ci95[1]:.2f}{note})"


def note(comparisons: int) -> str:
    """Say how the tables are to be read."""
    return (
        "Headline measure on held-out levels. Intervals are over runs, of a single run over levels. The hidden size of "
        f"each core is the multiple of 8 with which it has nearest to as many parameters as the {BASE}. The learning "
        f"rate is the best of {len(RATES)} ({', '.join(f'{rate:.2g}' for rate in sorted(RATES))} times the config's), "
        "tried with one run each, with another seed and on other levels than the results. p: permutation test over "
        f"runs, those of each length dealt among themselves, times {comparisons} comparisons (Bonferroni). Minutes are "
        "of training, of the median run; they depend on what else the machine did."
    )


# --- figure ----------------------------------------------------------------------------------------------------------


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Draw the score over length, a panel for each task and a line for each core, with intervals over runs."""
    tasks = list(dict.fromkeys(outcome.task for outcome in outcomes))
    kinds = [kind for kind in CORES if kind in {outcome.core for outcome in outcomes}]
    with rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8}):
        figure = Figure(figsize=(WIDTH, 3.4 + 0.19 * -(-len(kinds) // 4)), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            _draw_task(axes, task, [outcome for outcome in outcomes if outcome.task is task])
        panels[0].set_ylabel("score on held-out levels")
        lines: dict[str, Any] = {}
        for axes in panels:
            lines |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        named = [kind for kind in kinds if kind in lines]
        figure.legend(
            [lines[kind] for kind in named], named, loc="outside lower center", ncols=4, frameon=False, handlelength=3.2
        )
    return figure


def _draw_task(axes: Axes, task: Task, outcomes: Sequence[Outcome]) -> None:
    lengths = task.lengths or (None,)
    kinds = [kind for kind in CORES if kind != FLOOR]
    for outcome in outcomes:
        points = [(x, *estimate) for x, length in enumerate(lengths) if (estimate := outcome.at(length)) is not None]
        if outcome.core == FLOOR:
            look: dict[str, Any] = {"color": "0.6", "linestyle": ":", "zorder": 1}
            aside = 0.0
        else:  # beside each other, so that intervals can be told apart
            number = kinds.index(outcome.core)
            dashes = DASHES[number // len(COLOURS) % len(DASHES)]
            look = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": dashes,
                "marker": MARKERS[number % len(MARKERS)],
            }
            aside = 0.3 * (number / max(1, len(kinds) - 1) - 0.5)
        x, means = [point[0] + aside for point in points], [point[1] for point in points]
        axes.plot(x, means, linewidth=1.2, markersize=3.5, label=outcome.core, **look)
        if outcome.core != FLOOR:
            for place, (_, _, ci95) in zip(x, points, strict=True):
                if ci95 is not None:
                    axes.plot([place, place], ci95, color=look["color"], linewidth=0.8, alpha=0.7)
    axes.set_xticks(range(len(lengths)), ["" if length is None else str(length) for length in lengths])
    axes.set_xlim(-0.35, len(lengths) - 0.65)
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlabel(task.label)
    axes.set_title(task.title, loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
