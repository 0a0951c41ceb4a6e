"""Groups of runs that differ only in chance, their summaries, and the settings in which groups differ."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ppo_tbptt.analysis.runs import Point, Run
from ppo_tbptt.config import keys_marked
from ppo_tbptt.evaluation.statistics import Estimate, over_runs

FRACTIONS = (0.5, 0.9, 0.99)
"""Shares of the goal for which the time to reach them is compared."""

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one setting, in the order they were named."""

    letter: str
    """A, B, ...: its label in tables."""
    name: str
    """The run's folder, or the common prefix of several."""
    runs: tuple[Run, ...]

    @property
    def task(self) -> str:
        """The task as a key: results of one environment, options and limit on steps can be compared."""
        env = self.runs[0].config.env
        return json.dumps([env.id, env.options, env.max_episode_steps], sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One result of a group: over its runs, or for a single run with its interval over level seeds."""

    estimate: Estimate
    iqm: Estimate | None
    """Interquartile mean; None for a single run."""
    runs: int
    """Number of runs that have the result."""


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


def settings_of(run: Run) -> Settings:
    """Flatten a config without the fields marked `SAME_SETTING`: ``{"ppo.gamma": 0.99, ...}``."""
    settings: Settings = {"ranks": run.ranks}
    for name, value in run.config.to_dict().items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            dotted = f"{name}.{key}" if key else name
            if dotted == "env.options":
                settings |= {f"{dotted}.{option}": setting for option, setting in inner.items()}
            else:
                settings[dotted] = inner
    return {key: value for key, value in settings.items() if key not in keys_marked("same_setting")}


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs, in the order of the groups' first runs."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(settings_of(run), sort_keys=True), []).append(run)
    names = _names([run.path for run in runs])
    return [
        Group(letter=_letter(number), name=_common([names[run.path] for run in members]), runs=tuple(members))
        for number, members in enumerate(together.values())
    ]


def by_task(groups: Sequence[Group]) -> list[list[Group]]:
    """Collect the groups of each task, in the order of the tasks' first groups."""
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
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


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """Name paths relative to their common parent folder."""
    whole = {path: path.absolute() for path in paths}
    shared = Path(os.path.commonpath([path.parent for path in whole.values()]))
    return {path: str(absolute.relative_to(shared)) for path, absolute in whole.items()}


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    prefix = os.path.commonprefix(list(names))  # noqa: RUF071 (by character, not by folder)
    return f"{prefix}*" if prefix else f"{names[0]}, ..."


def differences(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Map each setting in which groups differ to its values by the groups' letters; None where it is not set."""
    settings = {group.letter: settings_of(group.runs[0]) for group in groups}
    keys = dict.fromkeys(key for of_one in settings.values() for key in of_one)
    found = {}
    for key in keys:
        values = {letter: of_one.get(key) for letter, of_one in settings.items()}
        if any(value != values[groups[0].letter] for value in values.values()):
            found[key] = values
    return found


def summarise(points: Sequence[Point | None]) -> Summary | None:
    """Summarise the last or the best results, one of each run; None where no run has one."""
    known = [point for point in points if point is not None]
    if not known:
        return None
    if len(known) == 1:
        return Summary(estimate=Estimate(mean=known[0].mean, ci95=known[0].ci95), iqm=None, runs=1)
    over = over_runs([[point.mean for point in known]])
    return Summary(estimate=over.mean, iqm=over.iqm, runs=len(known))


def goal(groups: Sequence[Group]) -> float | None:
    """Return the value that fractions refer to in one task: the headline's maximum, else the best result."""
    runs = [run for group in groups for run in group.runs]
    best = [run.best.mean for run in runs if run.best is not None]
    return runs[0].headline_max if runs[0].headline_max is not None else max(best, default=None)


def reach(group: Group, fraction: float, of: float) -> Reach:
    """Find when the runs of a group first reached ``fraction`` of the value ``of``."""
    value = fraction * of
    firsts = [next((point for point in run.held_out if point.mean >= value), None) for run in group.runs]
    reached = [point for point in firsts if point is not None]

    def middle(figures: list[float]) -> float | None:
        late = [float("inf")] * (len(firsts) - len(figures))
        result = median([*figures, *late])
        return None if result == float("inf") else result

    return Reach(
        fraction=fraction,
        value=value,
        runs=len(reached),
        env_steps=middle([float(point.env_steps) for point in reached]),
        hours=middle([point.hours for point in reached]),
        at_the_latest=any(run.held_out and run.held_out[0].mean >= value for run in group.runs),
    )
