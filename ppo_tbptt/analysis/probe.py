"""The memory probe: evaluations with the recurrent state disturbed show whether, and how far back, it is used."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.evaluation.evaluate import Evaluation, evaluate
from ppo_tbptt.evaluation.perturbations import AddNoise, Measure, Shuffle
from ppo_tbptt.evaluation.statistics import Estimate
from ppo_tbptt.models import Agent

NOISE = (0.1, 0.3, 1.0)
"""Standard deviations, in multiples of each unit's root mean square in the undisturbed state."""
INK, CURVE, SHUFFLE, NOISE_INK = "0.15", "#0072B2", "#D55E00", "0.42"  # dashes tell them apart too
NOISE_DASHES = ((0, (7, 2)), (0, (4, 2)), (0, (1.5, 1.5)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The evaluation of one disturbance of the recurrent state."""

    kind: Literal["intact", "forget", "shuffle", "noise"]
    amount: float | None
    """forget: the steps of an episode between wipes. noise: one of :data:`NOISE`."""
    measures: dict[str, Estimate]
    capped: int

    @property
    def label(self) -> str:
        """The disturbance in words."""
        if self.kind == "forget":
            return "wiped at every step" if self.amount == 1 else f"wiped every {self.amount:g} steps"
        if self.kind == "noise":
            return f"noise of {self.amount:g} x RMS"
        return {"intact": "as it is", "shuffle": "another level's"}[self.kind]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """The outcome of :func:`probe_memory`."""

    intact: Evaluation
    longest: int
    """Steps of the longest undisturbed episode; wipes further apart than that never occur."""
    state_rms: float
    """Root mean square of the undisturbed state over all units."""
    trials: list[Trial]
    """Intact, then wiped at growing intervals, exchanged, and with growing noise."""

    def of(self, kind: str) -> list[Trial]:
        """Return the trials of one kind."""
        return [trial for trial in self.trials if trial.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Return the undisturbed evaluation with the trials in it."""
        tree = asdict(self)
        return {**tree.pop("intact"), **tree}


def probe_memory(
    agent: Agent,
    env: EnvConfig,
    *,
    seeds: Sequence[int],
    repeats: int = 3,
    sampling_seed: int = 0,
    progress: Callable[[int, int | None], None] = lambda finished, total: None,
    **protocol: Any,
) -> ProbeResult:
    """Evaluate the agent once for each disturbance of its recurrent state.

    The state is left intact; wiped every 1, 2, 4, ... steps of an episode, up to the longest undisturbed one;
    exchanged at every step with that of an episode of another level; and given noise at every step.

    The arguments are those of :func:`~ppo_tbptt.evaluation.evaluate.evaluate`, but ``sampling_seed`` is also that of
    the disturbances, and ``progress`` gets the number of finished episodes, and that of all once it is known.
    """
    trials: list[Trial] = []
    total: int | None = None

    def play(kind: Any, amount: float | None = None, **how: Any) -> Evaluation:
        before = len(trials) * len(seeds) * repeats
        how |= protocol | {"sampling_seed": sampling_seed, "progress": lambda n: progress(before + n, total)}
        evaluation = evaluate(agent, env, seeds=seeds, repeats=repeats, **how)
        trials.append(Trial(kind=kind, amount=amount, measures=evaluation.measures, capped=evaluation.capped))
        return evaluation

    measure = Measure()
    intact = play("intact", disturb=measure)
    longest = int(max(row["length"] for row in intact.per_episode))
    spans = [2**i for i in range((longest - 1).bit_length())]
    total = (1 + len(spans) + 1 + len(NOISE)) * len(seeds) * repeats
    for span in spans:
        play("forget", span, forget_every=span)
    play("shuffle", disturb=Shuffle(sampling_seed))
    for amount in NOISE:
        play("noise", amount, disturb=AddNoise(measure.rms * amount, sampling_seed))
    return ProbeResult(
        intact=intact, longest=longest, state_rms=float(measure.rms.square().mean().sqrt()), trials=trials
    )


def draw_probe(probe: ProbeResult, *, title: str, top: float | None) -> Figure:
    """Draw the headline measure over the number of steps between wipes, with 95 % intervals.

    Horizontal lines are the other trials; ``top`` is the measure's largest possible value, if there is one.
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
        (trial, f"noise {trial.amount:g} x RMS", NOISE_INK, dashes)
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
