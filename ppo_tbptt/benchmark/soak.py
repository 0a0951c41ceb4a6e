"""Watch a long training: does memory grow, do files, threads or processes pile up, does it slow down?"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import monotonic

from ppo_tbptt.benchmark.memory import MEGABYTE, tree
from ppo_tbptt.config import Config
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer

WARMUP = 0.2
"""Share of the time after which everything should have its final size."""
MEMORY_GROWTH = 0.02
"""How much more memory all processes may hold at most in the last fifth than in the one after the warm-up.

The most that is seen, for it goes up and down: making a video takes 90 MB for a moment.
"""
SLOWDOWN = 0.05
"""How much fewer steps per second (median) the last fifth may make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sample of all processes of the training, between two iterations."""

    minutes: float
    memory_mb: float
    files: int
    threads: int
    processes: int
    steps_per_second: float
    """Since the sample before."""


def soak(config: Config, run_dir: Path, *, minutes: float, seconds_between: float) -> Iterator[Sample]:
    """Train for so many minutes and yield a sample every so many seconds (Linux only).

    Raises:
        RuntimeError: the config's training is over before that.
    """
    with Trainer(config, run_dir) as trainer:
        began = looked = monotonic()
        steps = 0
        for _ in trainer:
            steps += trainer.batch_size
            now = monotonic()
            if now - looked >= seconds_between:
                yield _sample((now - began) / 60, steps / (now - looked))
                looked, steps = monotonic(), 0
            if now - began >= 60 * minutes:
                return
    raise RuntimeError(f"the training was over within {minutes:g} minutes; give it more total_steps")


def _sample(minutes: float, steps_per_second: float) -> Sample:
    processes = tree()
    # Memory that is no file's: the libraries' pages are shared with whatever else runs, and come and go with it.
    anonymous = sum(mapping.anonymous for process in processes for mapping in process.memory_maps())
    return Sample(
        minutes=minutes,
        memory_mb=anonymous / MEGABYTE,
        files=sum(process.num_fds() for process in processes),
        threads=sum(process.num_threads() for process in processes),
        processes=len(processes),
        steps_per_second=steps_per_second,
    )


def problems(samples: Sequence[Sample], metrics: Path) -> list[str]:
    """Describe what grew, slowed down or is missing, a line each."""
    total = samples[-1].minutes
    first = [s for s in samples if WARMUP * total <= s.minutes < 2 * WARMUP * total]
    last = [s for s in samples if s.minutes >= (1 - WARMUP) * total]
    found = []
    before, after = (max(s.memory_mb for s in part) for part in (first, last))
    if after > (1 + MEMORY_GROWTH) * before:
        found.append(f"memory grew from {before:.1f} to {after:.1f} MB")
    for name in ("files", "threads", "processes"):
        before, after = (max(getattr(s, name) for s in part) for part in (first, last))
        if after > before:
            found.append(f"{name} grew from {before} to {after}")
    fast, slow = median(s.steps_per_second for s in first), median(s.steps_per_second for s in last)
    if slow < (1 - SLOWDOWN) * fast:
        found.append(f"steps per second fell from {fast:,.0f} to {slow:,.0f}")
    iterations = [row["iteration"] for row in read_metrics(metrics)]
    if iterations != list(range(1, len(iterations) + 1)):
        found.append(f"{metrics} does not hold each of {len(iterations)} iterations once")
    return found
