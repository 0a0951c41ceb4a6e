"""A run's folder as data: its config, how far it has come, and how well it does on held-out levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ppo_tbptt.config import Config, TrainConfig
from ppo_tbptt.envs import EnvSpec, make_env
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.folder import RunDir, RunDirError
from ppo_tbptt.run.metrics import read_metrics

PROTOCOL = TrainConfig()
"""The published protocol, which is also the default of ``evaluate``: levels and repeats are its ``eval_*``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The headline measure after ``env_steps`` steps and ``hours`` of training, evaluations during it included."""

    env_steps: int
    hours: float
    mean: float
    ci95: tuple[float, float] | None = None
    """Over level seeds; None where it is not known, as for what was evaluated during training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run as its folder tells it."""

    path: Path
    config: Config
    headline: str
    headline_max: float | None
    ranks: int
    """Processes that train it together, as its steps per iteration tell: the config is that of one of them."""
    env_steps: int
    hours: float
    steps_per_second: float | None
    """Median over iterations, evaluations not counted."""
    held_out: tuple[Point, ...]
    """By steps, at most one for each."""
    training: tuple[Point, ...]
    """Means over the episodes that ended in each iteration, on training levels."""

    @property
    def last(self) -> Point | None:
        return self.held_out[-1] if self.held_out else None

    @property
    def best(self) -> Point | None:
        """The first of them; where several are equal, one whose interval is known."""
        return max(self.held_out, key=lambda point: (point.mean, point.ci95 is not None), default=None)


def read_run(path: Path) -> Run:
    """Read the run in ``path``.

    Held-out results are what was evaluated during training and the files in ``evaluations/``, but for those of agents
    that were made to forget, on levels seen in training, or of an agent that a resumed run has discarded. Where some
    were sampled and others greedy, the sampled ones are taken; where several are of the same agent, the one by the
    published protocol, else the one of most episodes.

    Raises:
        RunDirError: no run, or one without metrics.
        MetricsError, JsonError: its metrics or an evaluation can't be read.
        ConfigError, CheckpointError, EnvError: its config or its checkpoint is broken, or its task is unknown here.
    """
    run = RunDir.open(path)
    config = Config.load(run.config)
    rows = _rows(run.metrics)
    spec = _spec(run, config)
    steps = [int(_number(row, "env_steps", run.metrics)) for row in rows]
    seconds = [
        sum(_number(row, f"time/{part}_seconds", run.metrics, 0.0) for part in ("iteration", "evaluation"))
        for row in rows
    ]
    hours = dict(zip(steps, (total / 3600 for total in accumulate(seconds)), strict=True))

    def points(tag: str) -> list[Point]:
        return [
            Point(env_steps=at, hours=hours[at], mean=_number(row, tag, run.metrics))
            for at, row in zip(steps, rows, strict=True)
            if tag in row
        ]

    speeds = [_number(row, "time/steps_per_second", run.metrics) for row in rows if "time/steps_per_second" in row]
    iterations = max(1.0, _number(rows[-1], "iteration", run.metrics))
    train = config.train
    first, count = train.eval_first_seed, train.eval_num_seeds
    results = [
        _Result(
            point=point,
            greedy=train.eval_greedy,
            published=_is_published(range(first, first + count), train.eval_repeats, 0),
            episodes=count * train.eval_repeats,
        )
        for point in points(f"eval/{spec.headline}")
    ]
    for file in sorted(run.evaluations.glob("*.json")):
        results += _from_file(file, config, spec.headline, hours)
    return Run(
        path=path,
        config=config,
        headline=spec.headline,
        headline_max=spec.headline_max,
        ranks=max(1, round(steps[-1] / iterations / config.batch_size)),
        env_steps=steps[-1],
        hours=hours[steps[-1]],
        steps_per_second=float(np.median(speeds)) if speeds else None,
        held_out=_chosen(results),
        training=tuple(points(f"episode/{spec.headline}")),
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises:
    RunDirError: a run is named twice.
    RunDirError, MetricsError, JsonError, ConfigError, CheckpointError, EnvError: see :func:`read_run`.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise RunDirError(f"{path}: named twice")
        seen.add(path.resolve())
    return [read_run(path) for path in paths]


def _rows(path: Path) -> list[dict[str, float]]:
    rows = read_metrics(path)
    if not rows:
        raise RunDirError(f"{path}: no metrics yet")
    return rows


def _number(row: Mapping[str, Any], key: str, path: Path, default: float | None = None) -> float:
    value = row.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RunDirError(f"{path}: {key} must be a number in every object, not {value!r}")
    return float(value)


def _spec(run: RunDir, config: Config) -> EnvSpec:
    """From a checkpoint, which needs no environment to be installed; else from the environment itself."""
    if run.periodic():
        checkpoint, tree = run.load_newest()
        try:
            return EnvSpec.from_json(tree["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirError(f"{checkpoint}: its description of the environment is broken") from error
    env = make_env(config.env.id, options=config.env.options, max_episode_steps=config.env.max_episode_steps)
    try:
        return env.spec
    finally:
        env.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """A held-out result, and what decides whether it is the one to take."""

    point: Point
    greedy: bool
    published: bool
    episodes: int

    @property
    def rank(self) -> tuple[bool, int, bool]:
        return self.published, self.episodes, self.point.ci95 is not None


def _is_published(seeds: Sequence[int], repeats: int, sampling_seed: int) -> bool:
    first, count = PROTOCOL.eval_first_seed, PROTOCOL.eval_num_seeds
    return (list(seeds), repeats, sampling_seed) == (list(range(first, first + count)), PROTOCOL.eval_repeats, 0)


def _from_file(path: Path, config: Config, headline: str, hours: Mapping[int, float]) -> list[_Result]:
    """The one result of a file, or none where it does not count."""
    tree = read_evaluation(path)
    seeds, env = tree["seeds"], config.env
    seen = max(seeds) >= env.first_seed and min(seeds) < env.first_seed + env.num_seeds
    if tree["forget_every"] is not None or seen or tree["env_steps"] not in hours or headline not in tree["measures"]:
        return []
    measure = tree["measures"][headline]
    low_high = None if measure["ci95"] is None else (float(measure["ci95"][0]), float(measure["ci95"][1]))
    steps = tree["env_steps"]
    return [
        _Result(
            point=Point(env_steps=steps, hours=hours[steps], mean=float(measure["mean"]), ci95=low_high),
            greedy=tree["greedy"],
            published=_is_published(seeds, tree["repeats"], tree["sampling_seed"]),
            episodes=len(seeds) * tree["repeats"],
        )
    ]


def _chosen(results: Sequence[_Result]) -> tuple[Point, ...]:
    """One result for each number of steps."""
    kind = all(result.greedy for result in results)
    best: dict[int, _Result] = {}
    for result in results:
        steps = result.point.env_steps
        if result.greedy == kind and (steps not in best or result.rank > best[steps].rank):
            best[steps] = result
    return tuple(best[steps].point for steps in sorted(best))
