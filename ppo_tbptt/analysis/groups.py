"""Runs that differ in nothing but chance, and what groups of them differ in."""

import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any

from ppo_tbptt.analysis.runs import Point, Run
from ppo_tbptt.config import Config, keys_marked
from ppo_tbptt.evaluation.statistics import Estimate, over_runs

FRACTIONS = (0.5, 0.9, 0.99)

Settings = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one setting, in the order they were named."""

    letter: str
    """A, B, ...: short for tables."""
    name: str
    """The run's folder, or what the folders of its runs have in common."""
    runs: tuple[Run, ...]

    @property
    def task(self) -> str:
        return task_key(self.runs[0].config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One figure of a group: over its runs, or for one run with the interval over level seeds."""

    estimate: Estimate
    iqm: Estimate | None
    """None for one run."""
    runs: int
    """Those that have the figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When ``value`` was first reached or passed. The median over runs, where one that has not yet counts as later than
    all others: None where that is half of them or more."""

    fraction: float
    value: float
    runs: int
    """Those that have reached it."""
    env_steps: float | None
    hours: float | None
    at_the_latest: bool
    """It was passed at the very first held-out result of a run, so when exactly is not known."""


def settings_of(run: Run) -> Settings:
    """``{"ppo.gamma": 0.99, "env.options.arena_size": 5, ...}``, without those marked `SAME_SETTING`."""
    settings: Settings = {"ranks": run.ranks}
    for name, value in run.config.to_dict().items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            dotted = f"{name}.{key}" if key else name
            if dotted == "env.options":
                settings |= {f"{dotted}.{option}": setting for option, setting in inner.items()}
            else:
                settings[dotted] = inner
    return {key: value for key, value in settings.items() if key not in keys_marked("same_setting")}


def task_key(config: Config) -> str:
    """Equal for runs whose results can be held against each other: environment, options and limit on episodes."""
    env = config.env
    return json.dumps([env.id, env.options, env.max_episode_steps], sort_keys=True)


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Groups in the order of their first runs."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        together.setdefault(json.dumps(settings_of(run), sort_keys=True), []).append(run)
    names = _names([run.path for run in runs])
    return [
        Group(letter=_letter(number), name=_common([names[run.path] for run in members]), runs=tuple(members))
        for number, members in enumerate(together.values())
    ]


def by_task(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups whose results can be held against each other, in the order of their first."""
    tasks: dict[str, list[Group]] = {}
    for group in groups:
        tasks.setdefault(group.task, []).append(group)
    return list(tasks.values())


def task_titles(tasks: Sequence[Sequence[Group]]) -> list[str]:
    """The environments' ids; with the options that tell them apart where an id occurs more than once."""
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
    """The last folders of the paths, with those above them where that tells them apart."""
    whole = {path: path.absolute() for path in paths}
    shared = Path(os.path.commonpath([path.parent for path in whole.values()]))
    return {path: str(absolute.relative_to(shared)) for path, absolute in whole.items()}


def _common(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    prefix = "".join(
        letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    )
    return f"{prefix}*" if prefix else f"{names[0]}, ..."


def differences(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """The settings in which groups differ, each with its value by the groups' letters; None where one has none."""
    settings = {group.letter: settings_of(group.runs[0]) for group in groups}
    keys = dict.fromkeys(key for of_one in settings.values() for key in of_one)
    found = {}
    for key in keys:
        values = {letter: of_one.get(key) for letter, of_one in settings.items()}
        if any(value != values[groups[0].letter] for value in values.values()):
            found[key] = values
    return found


def summarise(points: Sequence[Point | None]) -> Summary | None:
    """``points``: of each run its last, or its best. None where no run has one."""
    known = [point for point in points if point is not None]
    if not known:
        return None
    if len(known) == 1:
        return Summary(estimate=Estimate(mean=known[0].mean, ci95=known[0].ci95), iqm=None, runs=1)
    over = over_runs([[point.mean for point in known]])
    return Summary(estimate=over.mean, iqm=over.iqm, runs=len(known))


def goal(groups: Sequence[Group]) -> float | None:
    """What the fractions are of, for groups of one task: the measure's maximum, else the best value any run got."""
    runs = [run for group in groups for run in group.runs]
    best = [run.best.mean for run in runs if run.best is not None]
    return runs[0].headline_max if runs[0].headline_max is not None else max(best, default=None)


def reach(group: Group, fraction: float, of: float) -> Reach:
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
