"""Runs read from their folders: config, progress, and results on training and held-out levels."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from ppo_tbptt.config import Config, TrainConfig
from ppo_tbptt.envs import EnvSpec, make_env
from ppo_tbptt.evaluation.result_file import read_evaluation
from ppo_tbptt.run.agents import AgentDir, agent_at, nearest_agents
from ppo_tbptt.run.folder import RunDir, RunDirError
from ppo_tbptt.run.metrics import read_metrics

PROTOCOL = TrainConfig()
"""Its ``eval_*`` fields are the published protocol, the default of ``evaluate``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The headline measure after so many steps and hours of training, evaluations included."""

    env_steps: int
    hours: float
    mean: float
    ci95: tuple[float, float] | None = None
    """Over level seeds; None where it is unknown, as for evaluations during training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the folder of a run, or of an agent, tells."""

    path: Path
    config: Config
    headline: str
    headline_max: float | None
    ranks: int
    """Number of ranks, derived from the steps per iteration, since the config is that of one rank."""
    env_steps: int
    hours: float
    steps_per_second: float | None
    """Median over iterations, evaluations excluded."""
    held_out: tuple[Point, ...]
    """Ascending, at most one for each number of steps."""
    training: tuple[Point, ...]
    """Means over the training episodes that ended in each iteration."""

    @property
    def last(self) -> Point | None:
        """The last held-out result."""
        return self.held_out[-1] if self.held_out else None

    @property
    def best(self) -> Point | None:
        """The best held-out result; of equals the first, preferably with an interval."""
        return max(self.held_out, key=lambda point: (point.mean, point.ci95 is not None), default=None)


def read_run(path: Path) -> Run:
    """Read the run or the agent in ``path``, or the package's agent of that name.

    Held-out results are the evaluations during training and the files in ``evaluations/``, except those with a wiped
    state, on training levels, or of steps that are not in the metrics. Sampled results are preferred to greedy ones.
    Of several after the same number of steps, the published protocol is preferred, then the most episodes.

    Raises:
        RunDirError: there is no run, or it has no metrics.
        MetricsError, JsonError, ConfigError, CheckpointError: a file of it is broken.
        EnvError: its environment is unknown.
    """
    if agent := agent_at(path):
        return _read_agent(path, agent)
    if not os.path.lexists(path):
        raise RunDirError(f"{path}: no such run folder or agent; {nearest_agents(str(path))}")
    run = RunDir.open(path)
    config = Config.load(run.config)
    rows = read_metrics(run.metrics)
    if not rows:
        raise RunDirError(f"{run.metrics}: no metrics yet")
    spec = _spec(run, config)
    steps = [int(row["env_steps"]) for row in rows]
    seconds = [row.get("time/iteration_seconds", 0.0) + row.get("time/evaluation_seconds", 0.0) for row in rows]
    hours = dict(zip(steps, (total / 3600 for total in accumulate(seconds)), strict=True))

    def points(tag: str) -> list[Point]:
        return [
            Point(env_steps=at, hours=hours[at], mean=float(row[tag]))
            for at, row in zip(steps, rows, strict=True)
            if tag in row
        ]

    speeds = [row["time/steps_per_second"] for row in rows if "time/steps_per_second" in row]
    iterations = max(1.0, rows[-1]["iteration"])
    train = config.train
    results = [
        _Result(point, _seeds(train), train.eval_repeats, train.eval_greedy, sampling_seed=0)
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
        held_out=_choose(results),
        training=tuple(points(f"episode/{spec.headline}")),
    )


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read several runs; raises as :func:`read_run`.

    Raises:
        RunDirError: a run is named twice.
    """
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if resolved[number] in resolved[:number]:
            raise RunDirError(f"{path}: named twice")
    return [read_run(path) for path in paths]


def _read_agent(path: Path, agent: AgentDir) -> Run:
    """Read the curve and the card of an agent, which ``path`` is or names."""
    card, curve = agent.read_card(), agent.read_curve()
    return Run(
        path=path,
        config=Config.load(agent.config),
        headline=card.headline,
        headline_max=card.headline_max,
        ranks=card.ranks,
        env_steps=max([card.env_steps, *(point.env_steps for point in curve)]),
        hours=max([card.hours, *(point.hours for point in curve)]),
        steps_per_second=None,
        held_out=tuple(
            Point(
                env_steps=point.env_steps,
                hours=point.hours,
                mean=point.held_out,
                ci95=None if point.low is None or point.high is None else (point.low, point.high),
            )
            for point in curve
            if point.held_out is not None
        ),
        training=tuple(
            Point(env_steps=point.env_steps, hours=point.hours, mean=point.training)
            for point in curve
            if point.training is not None
        ),
    )


def _spec(run: RunDir, config: Config) -> EnvSpec:
    """Read the spec from the newest checkpoint, else from the environment, which must be installed then."""
    if run.periodic():
        checkpoint, tree = run.load_newest()
        try:
            return EnvSpec.from_json(tree["spec"])
        except (KeyError, TypeError, ValueError) as error:
            raise RunDirError(f"{checkpoint}: its description of the environment is broken") from error
    task, previous = config.env, config.model.previous
    env = make_env(task.id, options=task.options, max_episode_steps=task.max_episode_steps, previous=previous)
    env.close()
    return env.spec


@dataclass(frozen=True, slots=True)
class _Result:
    """A held-out result, and how it was measured."""

    point: Point
    seeds: list[int]
    repeats: int
    greedy: bool
    sampling_seed: int

    @property
    def precedence(self) -> tuple[bool, int, bool]:
        """The published protocol is preferred, then more episodes, then a known interval."""
        published = (self.seeds, self.repeats, self.sampling_seed) == (_seeds(PROTOCOL), PROTOCOL.eval_repeats, 0)
        return published, len(self.seeds) * self.repeats, self.point.ci95 is not None


def _seeds(train: TrainConfig) -> list[int]:
    return list(range(train.eval_first_seed, train.eval_first_seed + train.eval_num_seeds))


def _from_file(path: Path, config: Config, headline: str, hours: Mapping[int, float]) -> list[_Result]:
    """Return the one result of an evaluation file, or none where it does not count."""
    tree = read_evaluation(path)
    seeds, env, steps = tree["seeds"], config.env, tree["env_steps"]
    seen = max(seeds) >= env.first_seed and min(seeds) < env.first_seed + env.num_seeds
    if tree["forget_every"] is not None or seen or steps not in hours or headline not in tree["measures"]:
        return []
    measure = tree["measures"][headline]
    ci95 = measure["ci95"] and (float(measure["ci95"][0]), float(measure["ci95"][1]))
    point = Point(env_steps=steps, hours=hours[steps], mean=float(measure["mean"]), ci95=ci95)
    return [_Result(point, seeds, tree["repeats"], tree["greedy"], tree["sampling_seed"])]


def _choose(results: Sequence[_Result]) -> tuple[Point, ...]:
    """Choose one result for each number of steps: of equals the first."""
    greedy = all(result.greedy for result in results)
    descending = sorted(results, key=lambda result: result.precedence, reverse=True)
    best: dict[int, Point] = {}
    for result in descending:
        if result.greedy == greedy:
            best.setdefault(result.point.env_steps, result.point)
    return tuple(best[steps] for steps in sorted(best))
