"""Time whole iterations of one or two settings in turn, and compute figures from them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ppo_tbptt.benchmark.arithmetic import forward_flop, passes_per_step, peak_flops
from ppo_tbptt.benchmark.ceiling import Ceiling, measure_ceiling
from ppo_tbptt.benchmark.clock import synchronize
from ppo_tbptt.benchmark.memory import PeakMemory
from ppo_tbptt.envs import resolve_workers
from ppo_tbptt.training.trainer import Trainer

PARTS = ("environments", "inference", "transfer", "sequences", "learning")
"""The parts that a training iteration times; ``rest`` is what is in none of them."""
MAX_EXTRA_ITERATIONS = 2
"""Iterations beside the warm-up and the timed ones: one for the memory, one for the profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One timed iteration."""

    total: float
    """Seconds until the device has done its work."""
    seconds: dict[str, float]
    """Seconds by part; they add up to ``total``."""
    padding_fraction: float
    """As the trainer reports it: of minibatches padded to their longest sequence, whether or not the core pads."""


@dataclass(slots=True, kw_only=True)
class Setting:
    """A trainer to be measured, and what has been measured so far."""

    trainer: Trainer
    source: str
    """The config's file."""
    overrides: dict[str, str]
    iterations: list[Iteration] = field(default_factory=list)
    memory_mb: dict[str, float | None] = field(default_factory=dict)

    @property
    def middle(self) -> Iteration:
        """The median iteration (the slower of two), so that its parts add up to its whole."""
        return sorted(self.iterations, key=lambda iteration: iteration.total)[len(self.iterations) // 2]

    def steps_per_second(self, iteration: Iteration) -> float:
        """Return environment steps per second of an iteration."""
        return self.trainer.config.batch_size / iteration.total


def measure(settings: Sequence[Setting], warmup: int, iterations: int, say: Callable[[str], None]) -> None:
    """Measure the settings in turn (A B A B ...), so that a slower minute hits both; then their memory.

    Memory is sampled in an iteration of its own, because sampling takes time. With two settings each one's figure
    includes what the other holds at rest.
    """
    for number in range(warmup + iterations):
        timed = number >= warmup
        say(f"iteration {number - warmup + 1} of {iterations}" if timed else f"warm-up {number + 1} of {warmup}")
        for setting in settings:
            iteration = run_iteration(setting.trainer)
            if timed:
                setting.iterations.append(iteration)
    say("memory")
    for setting in settings:
        trainer = setting.trainer
        with PeakMemory(trainer.device) as memory:
            next(trainer)
        setting.memory_mb = {"host": memory.host_mb, "device": memory.device_mb}


def run_iteration(trainer: Trainer) -> Iteration:
    """Run one iteration and take its time and its parts."""
    synchronize(trainer.device)
    began = perf_counter()
    scalars = next(trainer).scalars
    synchronize(trainer.device)
    total = perf_counter() - began
    seconds = {part: scalars.get(f"time/{part}", 0.0) * scalars["time/iteration_seconds"] for part in PARTS}
    seconds["rest"] = total - sum(seconds.values())
    return Iteration(total=total, seconds=seconds, padding_fraction=scalars["sequences/padding_fraction"])


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
    trainer = setting.trainer
    say("ceiling")
    ceiling = measure_ceiling(trainer)
    say("peak")
    dtype = trainer.agent.precision
    peak = peak_flops(trainer.device, dtype)
    return {
        **_speed(setting, ceiling),
        **_arithmetic(setting, peak),
        "peak_memory_mb": setting.memory_mb,
        "device": _device_name(trainer.device),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "num_workers": resolve_workers(trainer.config.env.num_workers, trainer.config.env.num_envs),
        "environments": f"{trainer.config.env.num_envs} {trainer.envs.where}",
        "torch": torch.__version__,
        "config": {"source": setting.source, "overrides": setting.overrides},
    }


def _speed(setting: Setting, ceiling: Ceiling) -> dict[str, Any]:
    speeds = [setting.steps_per_second(iteration) for iteration in setting.iterations]
    speed = setting.steps_per_second(setting.middle)
    batch_size = setting.trainer.config.batch_size
    limit = batch_size / ceiling.seconds
    padding = sum(iteration.padding_fraction for iteration in setting.iterations) / len(setting.iterations)
    return {
        "steps_per_second": speed,
        "spread": [min(speeds), max(speeds)],
        "iterations": len(speeds),
        "steps_per_iteration": batch_size,
        "seconds": setting.middle.seconds,
        "ceiling_steps_per_second": limit,
        "ceiling_seconds": asdict(ceiling),
        "fraction_of_ceiling": speed / limit,
        "padded_over_valid": 1.0,
        "padded_over_valid_if_padded": 1 / (1 - padding),
    }


def _arithmetic(setting: Setting, peak: dict[str, float]) -> dict[str, Any]:
    """Return operations per environment step, and their share of the time at the device's peak speed."""
    trainer = setting.trainer
    forward = forward_flop(trainer.config, trainer.envs.spec)
    passes = passes_per_step(trainer.config.ppo.num_epochs)
    speed = setting.steps_per_second(setting.middle)
    return {
        "flop_per_step": passes * sum(forward.values()),
        "peak_flops": peak,
        "fraction_of_peak": speed * passes * sum(flop / peak[kind] for kind, flop in forward.items()),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def compare(base: Setting, other: Setting) -> dict[str, Any]:
    """Return how much faster ``other`` is: the ratio of median speeds, and the range of the ratios of neighbours."""
    pairs = [
        other.steps_per_second(b) / base.steps_per_second(a)
        for a, b in zip(base.iterations, other.iterations, strict=True)
    ]
    ratio = other.steps_per_second(other.middle) / base.steps_per_second(base.middle)
    return {"ratio": ratio, "ratio_spread": [min(pairs), max(pairs)]}
