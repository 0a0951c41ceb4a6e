"""Groups of runs that differ only in chance, their summaries, and the settings in which groups differ."""

import json
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median
from typing import Any, Literal

from ppo_tbptt.analysis.runs import Point, Run
from ppo_tbptt.config import keys_marked
from ppo_tbptt.evaluation.statistics import Estimate, iqm_over_runs, mean_over_runs

FRACTIONS = (0.5, 0.9, 0.99)
"""Shares of the goal for which the time to reach them is compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One result of a group: over its runs, or for a single run with its interval over level seeds."""

    mean: float
    ci95: tuple[float, float] | None
    interval_over: Literal["runs", "level seeds"]
    iqm: Estimate | None
    """Interquartile mean; None for a single run."""
    runs: int
    """Number of runs that have the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one setting, in the order they were named."""

    letter: str
    """A, B, ...: its label in tables."""
    name: str
    """The run's folder, or the common prefix of several."""
    runs: tuple[Run, ...]

    @property
    def last(self) -> Summary | None:
        """Summary of the last held-out results of the runs; None where no run has one."""
        return _summarise([run.last for run in self.runs])

    @property
    def best(self) -> Summary | None:
        """Summary of the best held-out results of the runs; None where no run has one."""
        return _summarise([run.best for run in self.runs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When held-out results first reached ``value``: the median over runs.

    Runs that have not reached it count as infinitely late; the median is None where it is infinite.
    """

    fraction: float
    value: float
    runs: int
    """Number of runs that have reached it."""
    env_steps: float | None
    hours: float | None
    at_the_latest: bool
    """Whether some run reached it by its first held-out result, so that the time is only an upper bound."""


def _settings_of(run: Run) -> dict[str, Any]:
    """Flatten a config without the fields marked `SAME_SETTING`: ``{"ppo.gamma": 0.99, ...}``."""
    settings: dict[str, Any] = {"ranks": run.ranks}
    for name, value in run.config.to_dict().items():
        table = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        for key, inner in table.items():
            settings |= {f"{key}.{option}": x for option, x in inner.items()} if key == "env.options" else {key: inner}
    return {key: value for key, value in settings.items() if key not in keys_marked("same_setting")}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs, in the order of the groups' first runs."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(_settings_of(run), sort_keys=True), []).append(run)
    shared = os.path.commonpath([run.path.absolute().parent for run in runs])
    return [
        Group(
            letter=_letter(number),
            name=_common([str(run.path.absolute().relative_to(shared)) for run in members]),
            runs=tuple(members),
        )
        for number, members in enumerate(together.values())
    ]


def by_task(groups: Sequence[Group]) -> list[list[Group]]:
    """Collect the groups of each task, in the order of the tasks' first groups."""
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        env = group.runs[0].config.env
        task = json.dumps([env.id, env.options, env.max_episode_steps], sort_keys=True)
        tasks.setdefault(task, []).append(group)
    return list(tasks.values())


def task_titles(tasks: Sequence[Sequence[Group]]) -> list[str]:
    """Title tasks by environment id, with the options that distinguish tasks of one id."""
    envs = [groups[0].runs[0].config.env for groups in tasks]
    settings = [{"max_episode_steps": env.max_episode_steps, **env.options} for env in envs]
    titles = []
    for env, own in zip(envs, settings, strict=True):
        others = [other for e, other in zip(envs, settings, strict=True) if e.id == env.id and other != own]
        apart = [key for key in own if any(other.get(key) != own[key] for other in others)]
        both = [key for key in apart if all(key in other for other in others)]  # else one may be the default
        text = ", ".join(f"{key} = {json.dumps(own[key])}" for key in both or apart)
        titles.append(textwrap.shorten(f"{env.id}: {text}", 90, placeholder=" ...") if text else env.id)
    return titles


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"{_letter(number // 26 - 1)}{_letter(number % 26)}"


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    prefix = os.path.commonprefix(list(names))  # noqa: RUF071 (by character, not by folder)
    return f"{prefix}*" if prefix else f"{names[0]}, ..."


def differences(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Map each setting in which groups differ to its values by the groups' letters; None where it is not set."""
    settings = {group.letter: _settings_of(group.runs[0]) for group in groups}
    found = {}
    for key in dict.fromkeys(chain(*settings.values())):
        values = {letter: of_one.get(key) for letter, of_one in settings.items()}
        if any(value != values[groups[0].letter] for value in values.values()):
            found[key] = values
    return found


def _summarise(points: Sequence[Point | None]) -> Summary | None:
    known = [point for point in points if point is not None]
    if not known:
        return None
    if len(known) == 1:
        return Summary(mean=known[0].mean, ci95=known[0].ci95, interval_over="level seeds", iqm=None, runs=1)
    means = [point.mean for point in known]
    over, iqm = mean_over_runs(means), iqm_over_runs(means)
    return Summary(mean=over.mean, ci95=over.ci95, interval_over="runs", iqm=iqm, runs=len(known))


def goal(groups: Sequence[Group]) -> float | None:
    """Return the value that fractions refer to in one task: the headline's maximum, else the best result."""
    runs = [run for group in groups for run in group.runs]
    best = max((run.best.mean for run in runs if run.best is not None), default=None)
    return best if runs[0].headline_max is None else runs[0].headline_max


def reach(group: Group, fraction: float, of: float) -> Reach:
    """Find when the runs of a group first reached ``fraction`` of the value ``of``."""
    value = fraction * of
    firsts = [next((point for point in run.held_out if point.mean >= value), None) for run in group.runs]
    steps = median(math.inf if point is None else point.env_steps for point in firsts)
    hours = median(math.inf if point is None else point.hours for point in firsts)
    return Reach(
        fraction=fraction,
        value=value,
        runs=sum(point is not None for point in firsts),
        env_steps=None if steps == math.inf else float(steps),
        hours=None if hours == math.inf else hours,
        at_the_latest=any(run.held_out and run.held_out[0].mean >= value for run in group.runs),
    )
