"""Agents to hand on: folders with weights, config, card, learning curve and an episode; some are in the package.

Imports no torch, so that agents are listed at once.
"""

import csv
import difflib
import math
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Strict

from ppo_tbptt.config.load import validate
from ppo_tbptt.run.files import read_json
from ppo_tbptt.runtime.errors import InputError, shorten
from ppo_tbptt.runtime.files import read_file

AGENTS = Path(__file__).parents[1] / "agents"
"""The agents of the package, one folder each."""
MAX_BYTES = 2**24
"""Of a card or a curve."""


class AgentError(InputError):
    """One line that names the agent's file and its fault."""


class Measure(BaseModel, strict=True, frozen=True):
    """A mean over held-out levels and its 95 % interval."""

    mean: float
    ci95: Annotated[tuple[float, float] | None, Strict(False)]


class Levels(BaseModel, strict=True, frozen=True):
    """The protocol of the card's results: so many episodes on each level seed."""

    first_seed: int
    num_seeds: int
    repeats: int
    greedy: bool
    sampling_seed: int


class Card(BaseModel, strict=True, frozen=True):
    """What an agent is, what it can do and where it comes from: ``card.json``."""

    name: str
    env_id: str
    options: dict[str, Any]
    """Reset options; the environment's defaults hold for others."""
    max_episode_steps: int | None
    core: str
    parameters: int
    headline: str
    """The measure of the results."""
    headline_max: float | None
    levels: Levels
    result: Measure
    measures: dict[str, Measure]
    """All measures of the same episodes."""
    wiped: Measure | None
    """The same agent with its recurrent state wiped at every step; None for one without memory."""
    without_memory: Measure | None
    """An agent without memory, trained on the same task; None where unknown."""
    env_steps: int
    hours: float
    """Wall-clock time of training up to this checkpoint, evaluations included."""
    machine: str
    ranks: int
    seed: int
    chosen: str
    """How the checkpoint was chosen among those of the run."""
    config: str | None
    """The package's config that it was trained with, but for what ``command`` changes."""
    command: str
    """Trains it from scratch."""
    versions: list[str]


class CurvePoint(NamedTuple):
    """The headline measure after so many steps and hours of training; None where it was not measured."""

    env_steps: int
    hours: float
    training: float | None
    """Mean over training episodes since the point before."""
    held_out: float | None
    low: float | None
    """Of the 95 % interval of ``held_out``, over level seeds."""
    high: float | None


class AgentDir:
    """The folder of an agent: its paths, its card and its curve."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.weights = path / "weights.safetensors"
        self.config = path / "config.toml"
        self.card = path / "card.json"
        self.curve = path / "curve.csv"
        self.episode = path / "episode.gif"

    @property
    def files(self) -> list[Path]:
        """All files of an agent."""
        return [self.weights, self.config, self.card, self.curve, self.episode]

    def read_card(self) -> Card:
        """Read the card.

        Raises:
            JsonError, ConfigError: it can't be read, or a value in it is missing or can't be.
        """
        return validate(Card, read_json(self.card, MAX_BYTES), str(self.card))

    def read_curve(self) -> list[CurvePoint]:
        """Read the learning curve.

        Raises:
            AgentError: it can't be read, or a value in it can't be.
        """
        text = read_file(self.curve, ".csv", MAX_BYTES, AgentError).decode(errors="replace")
        points = []
        for number, row in enumerate(csv.DictReader(text.splitlines()), 2):
            try:
                measured = [_number(row[name]) if row[name] else None for name in CurvePoint._fields[2:]]
                points.append(CurvePoint(int(row["env_steps"]), _number(row["hours"]), *measured))
            except (KeyError, TypeError, ValueError):
                legal = f"numbers or nothing in the columns {', '.join(CurvePoint._fields)}"
                raise AgentError(f"{self.curve}:{number}: not a point of a curve; must be {legal}") from None
        return points


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def packaged_agents() -> dict[str, AgentDir]:
    """Return the agents of the package by name."""
    return {card.parent.name: AgentDir(card.parent) for card in sorted(AGENTS.glob("*/card.json"))}


def agent_at(path: Path) -> AgentDir | None:
    """Return the agent in the folder ``path``; where nothing is there, that of the package with this name.

    None if ``path`` is something else, such as a run, or neither exists.
    """
    if os.path.lexists(path):
        return AgentDir(path) if os.path.isfile(path / "card.json") else None
    return packaged_agents().get(str(path))


def nearest_agents(name: str) -> str:
    """Say which agent of the package may have been meant, or which there are."""
    names = list(packaged_agents())
    near = difflib.get_close_matches(name[:120], names, 1)
    return f"did you mean the agent {near[0]}?" if near else shorten(f"the package has {', '.join(names)}", 300)
