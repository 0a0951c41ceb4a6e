"""The figure of a memory probe."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_tbptt.analysis.probe import ProbeResult, Trial

INK, CURVE, SHUFFLE, NOISE = "0.15", "#0072B2", "#D55E00", "0.42"  # dashes and labels tell them apart too
NOISE_DASHES = ((0, (7, 2)), (0, (4, 2)), (0, (1.5, 1.5)))


def draw_probe(probe: ProbeResult, *, title: str, top: float | None) -> Figure:
    """Draw the headline measure over the number of steps between wipes, with 95 % intervals.

    Horizontal lines are the other trials.

    Args:
        probe: what to draw.
        title: of the figure.
        top: the measure's largest possible value, if there is one.
    """
    figure = Figure(figsize=(7.2, 4.2), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    name = probe.intact.headline
    (intact,), spans = probe.of("intact"), probe.of("forget")

    never = 2.0 ** len(spans)  # the next power of two stands for no wipes
    x = [*(float(trial.amount or 1) for trial in spans), never]
    points = [trial.measures[name] for trial in (*spans, intact)]
    means = [point.mean for point in points]
    if all(point.ci95 is not None for point in points):
        low, high = zip(*(point.ci95 for point in points if point.ci95), strict=True)
        axes.fill_between(x, low, high, color=CURVE, alpha=0.18, linewidth=0)
    axes.plot(x, means, "-o", color=CURVE, linewidth=2, markersize=5, zorder=3)

    lines = [(intact, "undisturbed", INK, "-")]
    lines += [(trial, "another level's state", SHUFFLE, "-.") for trial in probe.of("shuffle")]
    lines += [
        (trial, f"noise {trial.amount:g} x RMS", NOISE, dashes)
        for trial, dashes in zip(probe.of("noise"), NOISE_DASHES, strict=True)
    ]
    for trial, _, color, style in lines:
        axes.axhline(trial.measures[name].mean, color=color, linestyle=style, linewidth=1.2, zorder=2)

    axes.set_xscale("log", base=2)
    axes.set_xlim(0.85, never / 0.85)
    axes.set_xticks(x, [*(f"{int(k)}" for k in x[:-1]), "never"])
    axes.tick_params(axis="x", labelsize=10 if len(x) < 10 else 7.5)
    axes.minorticks_off()
    if top is not None:
        axes.set_ylim(-0.03 * top, 1.05 * top)
    axes.set_xlabel("recurrent state wiped every ... steps of an episode")
    axes.set_ylabel(name.replace("_", " "))
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _label_lines(figure, lines, name)
    return figure


def _label_lines(figure: Figure, lines: Sequence[tuple[Trial, str, str, object]], name: str) -> None:
    """Label horizontal lines at their right ends, without overlaps."""
    axes = figure.axes[0]
    bottom, top = axes.get_ylim()
    order = sorted(lines, key=lambda line: line[0].measures[name].mean, reverse=True)
    order.reverse()  # reversed after sorting, so that the first of equals is the highest
    wanted = [(line[0].measures[name].mean - bottom) / (top - bottom) for line in order]
    arrow = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5)}
    for (trial, text, color, _), y, place in zip(order, wanted, _spread(wanted, 0.06), strict=True):
        axes.annotate(
            f"{text}: {trial.measures[name].mean:.2f}",
            xy=(1.0, y),
            xytext=(1.04, place),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=color,
            arrowprops=arrow | {"color": color},
        )


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending ``places`` in [0, 1] to be at least ``gap`` apart."""
    moved = np.array(places, dtype=np.float64)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved[-1] = min(moved[-1], 1.0)
    for i in range(len(moved) - 2, -1, -1):
        moved[i] = min(moved[i], moved[i + 1] - gap)
    return moved.tolist()
