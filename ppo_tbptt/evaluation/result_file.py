"""Evaluations as they lie in a run's folder: a file may hold anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppo_tbptt.config.values import shorten
from ppo_tbptt.run.files import JsonError, read_json


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `train`, `evaluate` or `probe` wrote to ``path``: all that is read of it is there, and of the right type.

    Raises:
        JsonError: it can't be read, or a value in it is missing or can't be.
    """
    try:
        tree = read_json(path)
        problem = _problem(tree)
        if problem:
            raise JsonError(f"{path}: {problem}, as `evaluate` writes it")
    except JsonError as error:
        raise JsonError(f"{error}; delete it, or move it elsewhere") from None
    return tree


def _problem(tree: dict[str, Any]) -> str:
    """Of the first value that can't be: its key, itself, and what it must be."""
    for keys, (legal, fits) in _FIELDS.items():
        for key in keys.split():
            if key not in tree:
                return f"{key} is missing; must be {legal}"
            if not fits(tree[key]):
                return f"{key} is {_shown(tree[key])}; must be {legal}"
    for name, measure in tree["measures"].items():
        if not _is_measure(measure):
            legal = "an object with a number as mean, and two numbers or null as ci95"
            return f"measures.{shorten(name)} is {_shown(measure)}; must be {legal}"
    if tree["headline"] not in tree["measures"]:
        return f"headline is {_shown(tree['headline'])}; must be one of the measures"
    without = tree.get("headline_without_memory")
    if not _is_number(without) and without is not None:
        return f"headline_without_memory is {_shown(without)}; must be a number or null"
    return ""


def _is_whole(value: Any) -> bool:
    return type(value) is int  # True is an int too


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_measure(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_number(value.get("mean")) or "ci95" not in value:
        return False
    ci95 = value["ci95"]
    return ci95 is None or (isinstance(ci95, list) and len(ci95) == 2 and all(map(_is_number, ci95)))


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "checkpoint env_id headline": ("text", lambda value: isinstance(value, str)),
    "env_steps episodes repeats sampling_seed max_steps capped": ("a whole number", _is_whole),
    "forget_every": ("a whole number or null", lambda value: value is None or _is_whole(value)),
    "greedy": ("true or false", lambda value: isinstance(value, bool)),
    "seeds": (
        "a list of whole numbers, not empty",
        lambda value: isinstance(value, list) and bool(value) and all(map(_is_whole, value)),
    ),
    "measures": ("an object", lambda value: isinstance(value, dict)),
}


def _shown(value: Any) -> str:
    return shorten(json.dumps(value), 60)
