"""The ablation of ways to train through time: its runs, their results, and what they show as table and figure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_tbptt.analysis.study import SIGNIFICANT, Results, Study, final_evaluation
from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.evaluation.statistics import mean_over_runs, permutation_p
from ppo_tbptt.training.callbacks import Callback, Iteration

TASK = "ppo_tbptt/DelayedChoice-v0"
CHANCE = 0.25
DELAYS, LENGTHS = (3, 7, 15), (4, 8, 16)
"""Of the grid: sequences of each length reach from the choice to the cue of exactly one delay, and of shorter ones."""
GRID_SEEDS = {"gru": (1, 2), "lstm": (1,)}
CORE, DELAY, LENGTH, WAY_SEEDS = "gru", 7, 4, (1, 2, 3, 4, 5)
"""Where the ways are compared: sequences that are too short for the delay."""
STORED, ZEROED = "stored state", "zeroed state"
WAYS: Mapping[str, Mapping[str, Any]] = {
    STORED: {},
    ZEROED: {},  # there is no such setting: see `ZeroStates`; their configs, and `compare`, can't tell them apart
    "burn-in 4": {"ppo.burn_in": LENGTH},
    "refresh every epoch": {"ppo.refresh_every": 1},
    "k1 = 4, k2 = 8": {"ppo.sequence_stride": LENGTH, "ppo.sequence_length": 2 * LENGTH},
    "learnt initial state": {"core.initial_state": "learnt"},
    "jacobian norm 0.1": {"ppo.jacobian_norm_coef": 0.1},
}
"""Settings by the name of the way; the first is what the others are compared with."""


class ZeroStates(Callback):
    """Feeds zeros at the start of every sequence in the updates, as if no state had been stored with the rollout."""

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Zero the stored states; acting goes on from the carried state."""
        iteration.rollout.state.rows.zero_()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One cell of the ablation: a core, the delay of the task, and how backpropagation is cut."""

    core: str
    delay: int
    length: int
    way: str = STORED

    @property
    def name(self) -> str:
        """Name for folders: ``gru_delay7_length4_burn-in-4``."""
        way = "" if self.way == STORED else "_" + "".join(c if c.isalnum() else "-" for c in self.way)
        return f"{self.core}_delay{self.delay}_length{self.length}{way}"

    @property
    def overrides(self) -> dict[str, Any]:
        """What differs from the config of the ablation, by dotted key."""
        length = {"ppo.sequence_length": self.length}
        return {"core.kind": self.core, "env.options.delay": self.delay, **length, **WAYS[self.way]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run of a setting."""

    setting: Setting
    seed: int

    @property
    def name(self) -> str:
        """The run's folder."""
        return f"{self.setting.name}_seed{self.seed}"

    def config(self, base: Config) -> Config:
        """Return the run's config; raises as `Config.override`."""
        return base.override({**self.setting.overrides, "seed": self.seed})

    def needs(self) -> list["Trial"]:
        """No other runs."""
        return []

    def callbacks(self) -> list[Callback]:
        """Return what the run needs beyond its config."""
        return [ZeroStates()] if self.setting.way == ZEROED else []


def trials() -> list[Trial]:
    """List the 60 runs: the grid, then the ways, whose base is a cell of the grid with more seeds."""
    grid = [
        Trial(setting=Setting(core=core, delay=delay, length=length), seed=seed)
        for core, seeds in GRID_SEEDS.items()
        for delay, length, seed in product(DELAYS, LENGTHS, seeds)
    ]
    ways = [
        Trial(setting=Setting(core=CORE, delay=DELAY, length=LENGTH, way=way), seed=seed)
        for way, seed in product(WAYS, WAY_SEEDS)
    ]
    return list(dict.fromkeys([*grid, *ways]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Success of a setting on held-out levels.

    ci95: of several runs over runs, of a single one over levels.
    p_value: of the difference to the stored state, for a way with several runs: of an exact permutation test over runs,
        times the number of ways that are compared with it (Bonferroni).
    """

    setting: Setting
    runs: dict[int, float] = field(default_factory=dict)
    mean: float
    ci95: tuple[float, float] | None
    p_value: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Convert to what the JSON file holds."""
        s = self.setting
        of_setting = {"core": s.core, "delay": s.delay, "sequence_length": s.length, "way": s.way}
        return {**of_setting, "success": self.mean, "ci95": self.ci95, "by_seed": self.runs, "p_value": self.p_value}


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read the finished runs in ``folder``; settings without one are left out.

    Raises:
        JsonError: a result's file is broken.
    """
    success: dict[Setting, dict[int, dict[str, Any]]] = {}
    for trial in trials():
        if (path := final_evaluation(folder, trial)).is_file():
            success.setdefault(trial.setting, {})[trial.seed] = read_evaluation(path)["measures"]["success"]
    means = {setting: {seed: m["mean"] for seed, m in runs.items()} for setting, runs in success.items()}
    base = list(means.get(Setting(core=CORE, delay=DELAY, length=LENGTH), {}).values())
    outcomes = []
    for setting, by_seed in means.items():
        runs = list(by_seed.values())
        estimate = mean_over_runs(runs)
        own = next(iter(success[setting].values()))["ci95"]
        ci95 = estimate.ci95 if len(runs) > 1 else own and (own[0], own[1])
        p_value = None
        if setting.way != STORED and min(len(runs), len(base)) > 1:
            p_value = min(1.0, permutation_p(runs, base) * (len(WAYS) - 1))
        outcomes.append(Outcome(setting=setting, runs=by_seed, mean=estimate.mean, ci95=ci95, p_value=p_value))
    return outcomes


class WaysThroughTime(Study):
    """Which sequence length reaches which delay, and what burn-in, refresh, overlap and the like change."""

    folder = Path("runs/ablate")

    def __init__(self, config: Path | None, overrides: dict[str, str]) -> None:
        source = config or "toy_delayed_choice"
        self.base = Config.load(source, overrides)
        if self.base.env.id != TASK:
            raise ConfigError(f"{source}: env.id = {self.base.env.id!r} has no delay to vary; must be {TASK!r}")

    @classmethod
    def trials(cls) -> list[Trial]:
        """See :meth:`Study.trials`."""
        return trials()

    def config(self, trial: Trial, folder: Path) -> Config:
        """See :meth:`Study.config`."""
        return trial.config(self.base)

    def results(self, folder: Path) -> Results | None:
        """See :meth:`Study.results`."""
        outcomes = read_outcomes(folder)
        return results(outcomes) if outcomes else None


# --- table ---------------------------------------------------------------------------------------------------------


def table_rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, ...]]:
    """Yield the table's head, then a row for each setting."""
    yield "core", "delay", "sequence length", "way", "runs", "success", "95 % interval", "differs from stored state"
    for o in outcomes:
        s = o.setting
        ci95 = "-" if o.ci95 is None else f"{o.ci95[0]:.2f} to {o.ci95[1]:.2f}"
        runs = str(len(o.runs))
        yield s.core, str(s.delay), str(s.length), s.way, runs, f"{o.mean:.2f}", ci95, verdict(o)


def verdict(outcome: Outcome) -> str:
    """Say whether a way differs from the stored state."""
    if outcome.setting.way == STORED:
        return "-"
    if outcome.p_value is None:
        return "too few runs to say"
    return f"{'yes' if outcome.p_value < SIGNIFICANT else 'not shown'} (p = {outcome.p_value:.3f})"


def results(outcomes: Sequence[Outcome]) -> Results:
    """Tell what the outcomes show."""
    note = (
        "Success on held-out levels; chance is 0.25. Intervals are over runs, of a single run over levels. "
        f"p: exact permutation test over runs, times the {len(WAYS) - 1} ways compared (Bonferroni)."
    )
    tree = [outcome.to_dict() for outcome in outcomes]
    return Results(tables={"": list(table_rows(outcomes))}, note=note, tree=tree, figure=draw(outcomes))


# --- figure --------------------------------------------------------------------------------------------------------


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Draw success over sequence length and delay for each core, and the ways beside each other with all their runs."""
    figure = Figure(figsize=(7.2, 5.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplot_mosaic([list(GRID_SEEDS), ["ways"] * len(GRID_SEEDS)], height_ratios=[1, 1.1])
    by_setting = {outcome.setting: outcome for outcome in outcomes}
    for core in GRID_SEEDS:
        _draw_grid(panels[core], core, by_setting)
    _draw_ways(panels["ways"], by_setting)
    return figure


def _draw_grid(axes: Axes, core: str, outcomes: Mapping[Setting, Outcome]) -> None:
    found = {
        (x, y): outcome
        for (x, length), (y, delay) in product(enumerate(LENGTHS), enumerate(DELAYS))
        if (outcome := outcomes.get(Setting(core=core, delay=delay, length=length))) is not None
    }
    cells = [
        [found[x, y].mean if (x, y) in found else float("nan") for x in range(len(LENGTHS))] for y in range(len(DELAYS))
    ]
    axes.imshow(cells, cmap="cividis", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (x, y), outcome in found.items():
        axes.text(
            x, y, f"{outcome.mean:.2f}", ha="center", va="center", color="white" if outcome.mean < 0.6 else "black"
        )
    reach = [sum(length <= delay for length in LENGTHS) - 0.5 for delay in DELAYS]
    for y, x in enumerate(reach):  # the edge: to its right sequences are longer than the delay
        axes.plot([x, x], [y - 0.5, y + 0.5], color="white", linewidth=3)
        if y + 1 < len(reach):
            axes.plot([x, reach[y + 1]], [y + 0.5, y + 0.5], color="white", linewidth=3)
    axes.set_xticks(range(len(LENGTHS)), [str(length) for length in LENGTHS])
    axes.set_yticks(range(len(DELAYS)), [str(delay) for delay in DELAYS])
    axes.set_xlabel("sequence_length")
    axes.set_ylabel("delay (steps)")
    axes.set_title(f"{core}: success", fontsize=8, loc="left")
    axes.set_title("right of the line: reaches the cue", fontsize=6, loc="right")


def _draw_ways(axes: Axes, outcomes: Mapping[Setting, Outcome]) -> None:
    labels = []
    for y, way in enumerate(WAYS):
        outcome = outcomes.get(Setting(core=CORE, delay=DELAY, length=LENGTH, way=way))
        labels.append(way if outcome is None or way == STORED else f"{way}\n{verdict(outcome)}")
        if outcome is None:
            continue
        axes.plot(list(outcome.runs.values()), [y] * len(outcome.runs), "o", color="#0072B2", alpha=0.6, markersize=5)
        axes.plot([outcome.mean] * 2, [y - 0.35, y + 0.35], color="black", linewidth=1.5)
    axes.axvline(CHANCE, color="0.5", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.05)
    axes.set_xlabel("success of each run, and their mean (dotted: chance)")
    where = f"{CORE}, delay {DELAY}, sequence_length {LENGTH}"
    axes.set_title(f"{where}: ways, and whether they differ from the stored state", fontsize=8, loc="left")
    axes.grid(axis="x", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
