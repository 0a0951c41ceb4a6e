"""A study of settings: its trials, the table of them, and which of the parameters mattered."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import optuna
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from ppo_tbptt.analysis.figures import COLOURS, WIDTH

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.RUNNING: "unfinished"}
STATES |= {TrialState.FAIL: "failed"}
CI95 = "ci95"
"""The trial's attribute with the interval of its value, where that is known."""
LEAST, TOP = 10, 5
"""Trials that tell which parameters mattered, and how many of them are compared with all."""


def name_of(number: int) -> str:
    """Return the name of a trial, which is that of its folder."""
    return f"trial_{number:04d}"


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Sort trials: finished, pruned (the longest first), unfinished, failed; by value, then by number."""
    order = list(STATES)

    def rank(trial: FrozenTrial) -> tuple[float, ...]:
        steps = trial.last_step or 0 if trial.state == TrialState.PRUNED else 0
        return order.index(trial.state), -steps, -(trial.value or 0.0), trial.number

    return sorted(trials, key=rank)


def row_of(trial: FrozenTrial) -> dict[str, Any]:
    """Convert a trial to what the JSON file holds; its value is that of its last evaluation, if there was one."""
    values = trial.intermediate_values
    return {
        "trial": name_of(trial.number),
        "state": STATES[trial.state],
        "env_steps": trial.last_step,
        "value": trial.value if trial.value is not None or not values else values[max(values)],
        "ci95": trial.user_attrs.get(CI95),
        "params": trial.params,
    }


def table_rows(trials: Sequence[FrozenTrial], keys: Sequence[str], headline: str) -> Iterator[tuple[str, ...]]:
    """Yield the table's head, then a row for each trial, the best first."""
    yield "trial", "state", "steps", headline, "95 % interval", *keys
    for trial in ranked(trials):
        row = row_of(trial)
        steps, value = (f"{row['env_steps']:,}", f"{row['value']:.3f}") if row["env_steps"] else ("-", "-")
        ci95 = "-" if row["ci95"] is None else f"{row['ci95'][0]:.3f} to {row['ci95'][1]:.3f}"
        yield row["trial"], row["state"], steps, value, ci95, *(short(trial.params.get(key, "-")) for key in keys)


def short(drawn: Any) -> str:
    """Format a parameter's value."""
    return f"{drawn:.4g}" if isinstance(drawn, float) else str(drawn)


def markdown(trials: Sequence[FrozenTrial], keys: Sequence[str], headline: str, note: str) -> str:
    """Write the table as markdown, with a note below."""
    head, *rows = table_rows(trials, keys, headline)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ("---",) * len(head), *rows)) + f"\n{note}\n"


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Tell which parameters decide whether a trial is among the best (PED-ANOVA, Watanabe et al. 2023); they add to 1.

    Pruned trials count with the value at which they were pruned: worse trials had been dropped by then, so that they
    are below the best ones, and this is all that matters here. Empty with fewer than ``LEAST`` trials, or where all are
    equally good.
    """
    done = [trial for trial in trials if trial.value is not None]
    values = sorted((trial.value for trial in done if trial.value is not None), reverse=True)
    if len(done) < LEAST or values[TOP - 1] == values[-1]:
        return {}
    view = optuna.create_study(direction="maximize")
    for t in done:
        view.add_trial(optuna.create_trial(params=t.params, distributions=t.distributions, value=t.value))
    top = max(TOP / len(done), 0.1)
    return get_param_importances(view, evaluator=PedAnovaImportanceEvaluator(target_quantile=top))


def draw(shares: Mapping[str, float], title: str) -> Figure:
    """Draw the importances as bars, the largest on top."""
    with rc_context({"font.size": 8, "axes.titlesize": 9, "axes.labelsize": 8}):
        figure = Figure(figsize=(WIDTH, 0.9 + 0.25 * len(shares)), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.barh(range(len(shares)), list(shares.values()), color=COLOURS[0], height=0.6)
        for y, share in enumerate(shares.values()):
            axes.text(share + 0.01, y, f"{share:.2f}", va="center")
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(0, 1.05)
        axes.set_xlabel("importance: how far the best trials' values differ from all trials' (sum 1)")
        axes.set_title(title, loc="left")
        axes.grid(axis="x", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
