"""Time whole iterations of one or two settings in turn, and compute figures from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch

from ppo_tbptt.benchmark.arithmetic import forward_flop, peak_flops
from ppo_tbptt.benchmark.ceiling import measure_ceiling
from ppo_tbptt.benchmark.memory import peak_memory
from ppo_tbptt.envs import resolve_workers
from ppo_tbptt.training.trainer import Trainer

PARTS = ("environments", "inference", "transfer", "sequences", "learning")
"""The parts that a training iteration times; ``rest`` is what is in none of them."""
MAX_EXTRA_ITERATIONS = 2
"""Iterations beside the warm-up and the timed ones: one for the memory, one for the profile."""


@dataclass(slots=True, kw_only=True)
class Setting:
    """A trainer to be measured, and what has been measured so far."""

    trainer: Trainer
    source: str
    """The config's file."""
    overrides: dict[str, str]
    iterations: list[dict[str, float]] = field(default_factory=list)
    """Seconds by part of each timed iteration, until the device has done its work."""
    padding: list[float] = field(default_factory=list)
    """As the trainer reports it: of minibatches padded to their longest sequence, whether or not the core pads."""
    computed: list[float] = field(default_factory=list)
    """Steps that the core is unrolled over for each one that counts in the loss."""
    distinct: list[float] = field(default_factory=list)
    """Shares of distinct frames; empty without images."""
    memory_mb: dict[str, float | None] = field(default_factory=dict)

    @property
    def middle(self) -> dict[str, float]:
        """The median iteration (the slower of two), so that its parts add up to its whole."""
        return sorted(self.iterations, key=lambda seconds: sum(seconds.values()))[len(self.iterations) // 2]

    def steps_per_second(self, seconds: dict[str, float]) -> float:
        """Return environment steps per second of an iteration."""
        return self.trainer.config.batch_size / sum(seconds.values())


def measure(settings: Sequence[Setting], warmup: int, iterations: int, say: Callable[[str], None]) -> None:
    """Measure the settings in turn (A B A B ...), so that a slower minute hits both; then their memory.

    Memory is sampled in an iteration of its own, because sampling takes time. With two settings each one's figure
    includes what the other holds at rest.
    """
    for number in range(warmup + iterations):
        timed = number >= warmup
        say(f"iteration {number - warmup + 1} of {iterations}" if timed else f"warm-up {number + 1} of {warmup}")
        for setting in settings:
            seconds, scalars = _run_iteration(setting.trainer)
            if timed:
                setting.iterations.append(seconds)
                setting.padding.append(scalars["sequences/padding_fraction"])
                setting.computed.append(scalars.get("sequences/computed_over_counted", 1.0))
                if "sequences/distinct_fraction" in scalars:
                    setting.distinct.append(scalars["sequences/distinct_fraction"])
    say("memory")
    for setting in settings:
        with peak_memory(setting.trainer.device) as setting.memory_mb:
            next(setting.trainer)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _run_iteration(trainer: Trainer) -> tuple[dict[str, float], dict[str, float]]:
    """Run one iteration. Return its seconds by part, and its scalars."""
    synchronize(trainer.device)
    began = perf_counter()
    scalars = next(trainer).scalars
    synchronize(trainer.device)
    total = perf_counter() - began
    seconds = {part: scalars.get(f"time/{part}", 0.0) * scalars["time/iteration_seconds"] for part in PARTS}
    seconds["rest"] = total - sum(seconds.values())
    return seconds, scalars


def write_profile(trainer: Trainer, path: Path) -> None:
    """Write the trace of one iteration (.json or .json.gz), for Perfetto or TensorBoard."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        next(trainer)
        synchronize(trainer.device)
    profile.export_chrome_trace(str(path))


def describe(setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures of a measured setting, after measuring its ceiling and the device's peak."""
    trainer, config = setting.trainer, setting.trainer.config
    say("ceiling")
    ceiling = measure_ceiling(trainer)
    say("peak")
    precision = trainer.agent.precision
    peak = peak_flops(trainer.device, precision)
    speeds = [setting.steps_per_second(iteration) for iteration in setting.iterations]
    speed, limit = setting.steps_per_second(setting.middle), config.batch_size / sum(ceiling.values())
    forward = forward_flop(config, trainer.envs.spec)
    # Acting is one forward pass; an epoch takes three, as the gradients by inputs and by weights cost one each.
    passes = 1 + 3 * config.ppo.num_epochs
    return {
        "steps_per_second": speed,
        "spread": [min(speeds), max(speeds)],
        "iterations": len(speeds),
        "steps_per_iteration": config.batch_size,
        "seconds": setting.middle,
        "ceiling_steps_per_second": limit,
        "ceiling_seconds": ceiling,
        "fraction_of_ceiling": speed / limit,
        "distinct_fraction": mean(setting.distinct) if setting.distinct else None,
        "computed_over_counted": mean(setting.computed),
        "padded_over_valid": 1 / (1 - mean(setting.padding)) if trainer.agent.core.padded else 1.0,
        "padded_over_valid_if_padded": 1 / (1 - mean(setting.padding)),
        "flop_per_step": passes * sum(forward.values()),
        "peak_flops": peak,
        "fraction_of_peak": speed * passes * sum(flop / peak[kind] for kind, flop in forward.items()),
        "peak_memory_mb": setting.memory_mb,
        "device": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "cpu",
        "precision": str(precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "num_workers": resolve_workers(config.env.num_workers, config.env.num_envs),
        "environments": f"{config.env.num_envs} {trainer.envs.where}",
        "torch": torch.__version__,
        "config": {"source": setting.source, "overrides": setting.overrides},
    }


def compare(base: Setting, other: Setting) -> dict[str, Any]:
    """Return how much faster ``other`` is: the ratio of median speeds, and the range of the ratios of neighbours."""
    pairs = [
        other.steps_per_second(b) / base.steps_per_second(a)
        for a, b in zip(base.iterations, other.iterations, strict=True)
    ]
    ratio = other.steps_per_second(other.middle) / base.steps_per_second(base.middle)
    return {"ratio": ratio, "ratio_spread": [min(pairs), max(pairs)]}
