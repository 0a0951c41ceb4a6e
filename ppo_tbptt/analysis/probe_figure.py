"""The figure of a memory probe."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_tbptt.analysis.probe import ProbeResult

INK, CURVE, SHUFFLE, NOISE = "0.15", "#0072B2", "#D55E00", "0.42"  # dashes tell them apart too
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
    if all(point.ci95 is not None for point in points):
        low, high = zip(*(point.ci95 for point in points if point.ci95), strict=True)
        axes.fill_between(x, low, high, color=CURVE, alpha=0.18, linewidth=0)
    axes.plot(x, [point.mean for point in points], "-o", color=CURVE, linewidth=2, markersize=5, zorder=3)

    lines = [(intact, "undisturbed", INK, "-")]
    lines += [(trial, "another level's state", SHUFFLE, "-.") for trial in probe.of("shuffle")]
    lines += [
        (trial, f"noise {trial.amount:g} x RMS", NOISE, dashes)
        for trial, dashes in zip(probe.of("noise"), NOISE_DASHES, strict=True)
    ]
    for trial, text, color, style in lines:
        mean = trial.measures[name].mean
        axes.axhline(mean, color=color, linestyle=style, linewidth=1.2, zorder=2, label=f"{text}: {mean:.2f}")

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
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5, handlelength=3)
    return figure
