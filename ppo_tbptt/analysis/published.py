"""The published learning curves, by task."""

import csv
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ppo_tbptt.config import EnvConfig

SOURCE = "Pleines et al., JMLR 2025"

AGENTS = {
    "gru": "GRU",
    "gru_rec": "GRU with reconstruction",
    "lstm": "LSTM",
    "ppo": "PPO without memory",
    "trxl": "Transformer-XL",
    "trxl_rec": "Transformer-XL with reconstruction",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedCurve:
    """The mean of five training runs on level seeds 200000 to 200049."""

    task: str
    """The environment's id, and the setting where several are published."""
    agent: str
    """One of ``AGENTS``."""
    env_steps: tuple[int, ...]
    means: tuple[float, ...]


def published_curves(env: EnvConfig) -> list[PublishedCurve]:
    """Return the published curves of a task, in the order of ``AGENTS``; none if its setting is not a published one.

    Every reset option must be as published, whether set or default, and no limit on steps may be set.
    """
    tasks = tomllib.loads(_data("published_tasks.toml"))["task"]
    task = next((task for task in tasks if _matches(task, env)), None)
    if task is None:
        return []
    points: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(line for line in _data("published_curves.csv").splitlines() if not line.startswith("#")):
        if row["task"] == task["name"]:
            points.setdefault(row["agent"], []).append((int(row["env_steps"]), float(row["mean"])))
    return [
        PublishedCurve(
            task=task["name"],
            agent=agent,
            env_steps=tuple(steps for steps, _ in sorted(points[agent])),
            means=tuple(mean for _, mean in sorted(points[agent])),
        )
        for agent in AGENTS
        if agent in points
    ]


def _data(name: str) -> str:
    return files("ppo_tbptt.analysis").joinpath(name).read_text(encoding="utf-8")


def _matches(task: dict[str, Any], env: EnvConfig) -> bool:
    published, defaults = task["options"], task["defaults"]
    return (
        task["env_id"] == env.id.rpartition(":")[2]
        and env.max_episode_steps is None
        and env.options.keys() <= published.keys()
        and all(env.options.get(key, defaults.get(key, value)) == value for key, value in published.items())
    )
