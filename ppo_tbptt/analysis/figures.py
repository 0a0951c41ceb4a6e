"""Learning curves as a figure for print, legible in grey and for the colour-blind."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import EngFormatter

from ppo_tbptt.analysis.groups import Group, task_titles
from ppo_tbptt.analysis.published import AGENTS, SOURCE, PublishedCurve, published_curves
from ppo_tbptt.analysis.runs import Point
from ppo_tbptt.evaluation.statistics import mean_over_runs

# Okabe and Ito's colours, which the colour-blind can tell apart, without yellow (faint on paper) and black (the
# published curves').
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
PUBLISHED_DASHES = dict(zip(AGENTS, ("-", "-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), "-."), strict=True))

WIDTH = 7.2
"""Inches, the text width of a page: 8 points stay 8 points in print."""
PANELS, CAPTION_LINE, LEGEND_LINE = 2.4, 0.155, 0.19
"""Inches of height."""
SHORT = 0.1
"""Runs shorter than this share of the published ones get a logarithmic axis, where they are more than a dot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningCurve:
    """Arrays ``[T]``; ``low`` and ``high`` bound the 95 % interval and are NaN where there is none."""

    env_steps: np.ndarray
    hours: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def average(runs: Sequence[Sequence[Point]]) -> LearningCurve | None:
    """Average runs, interpolated linearly at all their steps, over the range of steps that all of them cover.

    Runs without points are left out; None where no steps are left. The interval of a single run is its own, over level
    seeds; that of several is over runs.
    """
    runs = [run for run in runs if run]
    first = max((run[0].env_steps for run in runs), default=0)
    last = min((run[-1].env_steps for run in runs), default=0)
    steps = np.array(sorted({p.env_steps for run in runs for p in run if first <= p.env_steps <= last}), dtype=float)
    if not len(steps):
        return None
    own_steps = [[point.env_steps for point in run] for run in runs]
    values = np.stack([np.interp(steps, own, [p.mean for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    hours = np.stack([np.interp(steps, own, [p.hours for p in run]) for own, run in zip(own_steps, runs, strict=True)])
    if len(runs) == 1:
        known = {point.env_steps: point.ci95 for point in runs[0]}
        intervals = [known[step] for step in steps]
    else:
        intervals = [mean_over_runs(column.tolist()).ci95 for column in values.T]
    low, high = np.array([interval or (np.nan, np.nan) for interval in intervals]).T
    return LearningCurve(env_steps=steps, hours=hours.mean(0), mean=values.mean(0), low=low, high=high)


def learning_curves(tasks: Sequence[Sequence[Group]]) -> Figure:
    """Draw a row for each task: its groups' held-out headline measure over environment steps and over hours."""
    published = [published_curves(groups[0].runs[0].config.env) for groups in tasks]
    caption = textwrap.wrap(_caption([group for groups in tasks for group in groups], published), 116)
    entries = [
        len(groups) + sum(map(_needs_training_curve, groups)) + len(curves)
        for groups, curves in zip(tasks, published, strict=True)
    ]
    heights = [PANELS + LEGEND_LINE * (-(-number // 2) + 1) for number in entries]
    heights.append(CAPTION_LINE * (len(caption) + 0.6))
    with rc_context({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8, "axes.labelsize": 8}):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=200, layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for row, title, groups, curves in zip(rows, task_titles(tasks), tasks, published, strict=False):
            _draw_task(row, title, groups, curves)
        rows[-1].text(0.015, 0.95, "\n".join(caption), fontsize=8, va="top", ha="left", linespacing=1.25)
    return figure


def save(figure: Figure, file: BinaryIO, kind: str) -> None:
    """Write ``figure`` as ``kind`` (png, svg or pdf); the same figure gives the same bytes."""
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with rc_context({"svg.hashsalt": "ppo_tbptt"}):
        figure.savefig(file, format=kind, metadata=metadata)


def _draw_task(row: SubFigure, title: str, groups: Sequence[Group], published: Sequence[PublishedCurve]) -> None:
    row.suptitle(title, fontsize=9, fontweight="bold")
    by_steps, by_time = row.subplots(1, 2, sharey=True)
    short = all(run.hours < 1 for group in groups for run in group.runs)
    by_time.set_xlabel(f"{'minutes' if short else 'hours'} of training, evaluations included")
    for number, group in enumerate(groups):
        look: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
        }
        marker = MARKERS[number % len(MARKERS)]
        held_out = average([run.held_out for run in group.runs])
        training = average([run.training for run in group.runs]) if _needs_training_curve(group) else None
        for axes in (by_steps, by_time):
            for curve in filter(None, (training, held_out)):
                x = curve.env_steps if axes is by_steps else curve.hours * (60 if short else 1)
                if curve is held_out:
                    _draw_held_out(axes, x, curve, _label(group), look, marker)
                else:
                    label = f"{_label(group)}: training episodes"
                    axes.plot(x, curve.mean, linewidth=0.8, alpha=0.6, label=label, **look)
    for curve in published:  # behind the runs, grey with dashes of their own; GRU is the darkest
        grey, dashes = "0.15" if curve.agent.startswith("gru") else "0.5", PUBLISHED_DASHES[curve.agent]
        style: dict[str, Any] = {"color": grey, "linestyle": dashes, "linewidth": 1.1, "zorder": 1}
        by_steps.plot(curve.env_steps, curve.means, label=f"published {AGENTS[curve.agent]}", **style)
    _set_axes(by_steps, by_time, groups, published)
    row.legend(
        *by_steps.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, handlelength=3.2
    )


def _needs_training_curve(group: Group) -> bool:
    """Whether held-out results are too few or too late for a curve, so that training episodes are drawn too."""
    return any(len(run.held_out) < 2 or run.held_out[0].env_steps > run.env_steps / 2 for run in group.runs)


def _draw_held_out(
    axes: Axes, x: np.ndarray, curve: LearningCurve, label: str, look: dict[str, Any], marker: str
) -> None:
    known = np.isfinite(curve.low)
    every = max(1, len(x) // 12)
    axes.plot(x, curve.mean, linewidth=1.5, marker=marker, markersize=4, markevery=every, label=label, zorder=3, **look)
    if known.all() and len(x) > 1:
        axes.fill_between(x, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)
    elif known.any():
        mean, low, high = curve.mean[known], curve.low[known], curve.high[known]
        errors = np.stack([mean - low, high - mean]).clip(min=0)
        axes.errorbar(x[known], mean, yerr=errors, fmt="none", ecolor=look["color"], capsize=2.5, linewidth=1, zorder=2)


def _set_axes(by_steps: Axes, by_time: Axes, groups: Sequence[Group], published: Sequence[PublishedCurve]) -> None:
    runs = [run for group in groups for run in group.runs]
    headline, largest = runs[0].headline, runs[0].headline_max
    unit = "sum of rewards" if headline == "return" else "number" if largest is None else "share"
    by_steps.set_ylabel(f"{headline.replace('_', ' ')} ({unit})")
    if largest is not None:
        by_steps.set_ylim(-0.03 * largest, 1.05 * largest)
    if published and max(run.env_steps for run in runs) < SHORT * max(curve.env_steps[-1] for curve in published):
        by_steps.set_xscale("log", nonpositive="mask")  # the published curves' first point is at 0
        by_steps.set_xlabel("environment steps (logarithmic)")
    else:
        by_steps.set_xlim(left=0)
        by_steps.set_xlabel("environment steps")
    by_steps.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_time.set_xlim(left=0)
    for axes in (by_steps, by_time):
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)


def _label(group: Group) -> str:
    name = group.name if len(group.name) <= 32 else f"{group.name[:16]}...{group.name[-13:]}"
    number, core = len(group.runs), group.runs[0].config.core.kind
    return f"{name} ({core}, {number} runs)" if number > 1 else f"{name} ({core})"


def _caption(groups: Sequence[Group], published: Sequence[Sequence[PublishedCurve]]) -> str:
    text = "Held-out levels."
    if any(len(group.runs) > 1 for group in groups):
        text += " Several runs of one config: mean of those with results, as far as all have come, and shaded its 95 %"
        text += " interval over runs."
    if any(len(group.runs) == 1 for group in groups):
        text += " A single run: 95 % interval over level seeds, where an evaluation's file tells it."
    if any(map(_needs_training_curve, groups)):
        text += " Thin: training episodes, on training levels, of runs without held-out results on the way."
    if any(published):
        text += f" Published curves (without times): means over 5 runs, {SOURCE}."
        if any("MortarMayhem" in curve.task for curves in published for curve in curves):
            text += " Those of Mortar Mayhem count a failed last command as completed, ours do not."
    return text
