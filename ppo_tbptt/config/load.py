"""From TOML files and command lines to pydantic models, with errors of one line. Knows no setting by name."""

import copy
import functools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppo_tbptt.config.fields import Node, child, describe, dotted, kinds, remedy, schema_of, shown
from ppo_tbptt.runtime.errors import InputError, printable, shorten
from ppo_tbptt.runtime.files import read_file

MAX_OPTION_DEPTH = 8


class ConfigError(InputError):
    """Always one printable line: ``<source>: <key>: <value and what is wrong>; <remedy>``."""


class Problem(ValueError):
    """Something wrong at ``keys[0]`` of a table; where another of ``keys`` was typed, that one is named instead."""

    def __init__(self, keys: tuple[str, ...], text: str) -> None:
        super().__init__(printable(text))  # pydantic cannot hold lone surrogates
        self.keys, self.text = keys, text


def validate(model: type[BaseModel], tree: Any, source: str, typed: Mapping[str, str] | None = None) -> Any:
    """Make the model of ``tree``.

    Raises:
        ConfigError: the first thing that is wrong. It names ``source``, or where the key or a part of it was ``typed``.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problem = _explain(model, tree, error)
    for key in problem.keys:
        for name, place in (typed or {}).items():
            if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                raise ConfigError(f"{place}: {problem.text}")
    raise ConfigError(f"{source}: {shorten(problem.keys[0])}: {problem.text}")


def _explain(model: type[BaseModel], tree: Any, error: ValidationError) -> Problem:
    """Say the first error in words, unknown keys before all others."""
    unknown = ("extra_forbidden", "invalid_key")
    first = min(error.errors(include_url=False), key=lambda details: details["type"] not in unknown)
    keys, value = [], tree
    for name in first["loc"]:
        if not isinstance(value, Mapping) or name not in value:
            break  # the rest names what is missing, items of a list, or alternatives of a union
        keys, value = [*keys, str(name)], value[name]
    if first["type"] in unknown:
        return Problem((dotted(keys),), f"unknown, with value {shown(value)}; {remedy(model, keys)}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Problem):
        return Problem(tuple(".".join(filter(None, (dotted(keys), key))) for key in cause.keys), cause.text)
    wrong = f"{shown(value)} is not allowed"
    if first["type"] == "missing" and isinstance(value, Mapping):
        keys, wrong = [str(name) for name in first["loc"]], "missing"
    legal = describe(functools.reduce(child, keys, schema_of(model)))
    return Problem((dotted(keys) or "config",), f"{wrong}; must be {legal}")


def override(model: type[BaseModel], tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> Any:
    """Make the model of ``tree`` with dotted ``overrides`` over it; see `Config.load`. Changes ``tree``."""
    typed: dict[str, str] = {}
    for key, value in overrides.items():
        table = child(schema_of(model), key.partition(".")[0])
        keys = key.split(".", 1 if child(table, ...) else -1)  # names in a table of values may have dots
        if kinds(table) == ["object"] and not isinstance(tree.get(keys[0], {}), dict):
            continue  # what the file has there is wrong, and refused below
        is_text = isinstance(value, str)
        place = shorten(f"command line: --{key.replace('_', '-')}" if is_text else f"override: {key}")
        if is_text:
            value = _from_text(value, kinds(functools.reduce(child, keys, schema_of(model))), place)
        for name in reversed(keys):
            value = {name: value}
        merge(schema_of(model), tree, value, depth=len(keys))
        typed[dotted(keys)] = place
    return validate(model, tree, source, typed)


def merge(node: Node, tree: dict[str, Any], changes: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    """Put ``changes`` into ``tree``: tables are merged down to ``depth``, and replaced from there on.

    None removes an entry that is no field, such as an environment's option.
    """
    for name, value in changes.items():
        field = child(node, name)
        if depth > 1 and isinstance(value, Mapping):
            before = tree.get(name, copy.deepcopy(field.get("default", {})))
            if not isinstance(before, dict):  # a schedule's number is its first part
                before = dict.fromkeys(list(field.get("properties", {}))[:1], before)
            tree[name] = merge(field, before, value, depth - 1)
        elif value is None and name not in node.get("properties", {}):
            tree.pop(name, None)
        else:
            tree[name] = value
    return tree


def _from_text(text: str, wanted: Sequence[str], place: str) -> Any:
    """Read a value as typed, of a field of the ``wanted`` kinds; see `Config.load`."""
    if text.lower() == "none" and "string" not in wanted:
        return None
    try:
        [value] = tomllib.loads(f"v = {text.lower() if 'boolean' in wanted else text}").values()
    except (ValueError, RecursionError):
        if text.startswith(("[", "{", '"', "'")):
            raise ConfigError(f"{place}: {shown(text)} is not valid TOML; must be like [1, 2] or {{a = 1}}") from None
        is_number = re.fullmatch(r"[+-]?(\d+\.?|\.\d)\d*(e[+-]?\d+)?", text, re.ASCII)  # .5, 1. and 007 too
        value = float(text) if is_number and {"integer", "number"} & {*wanted} else text
    if wanted == ["string"]:
        return value if isinstance(value, str) else text
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and "integer" in wanted and "number" not in wanted else value


def plain(value: Any, key: str = "", depth: int = 1) -> Any:
    """Copy what TOML, JSON and a checkpoint can all hold: text, numbers, booleans, lists, tables.

    Raises:
        Problem: anything else in it; its key is relative to ``value``.
    """
    match value:
        case float() if math.isfinite(value):
            return value
        case bool() | int() if -(2**63) <= value < 2**63:
            return value
        case str() if value.encode(errors="ignore").decode() == value:  # no file can hold lone surrogates
            return value
        case list() | tuple() if depth <= MAX_OPTION_DEPTH:
            return [plain(item, key, depth + 1) for item in value]
        case Mapping() if depth <= MAX_OPTION_DEPTH and all(isinstance(name, str) for name in value):
            return {plain(k, key): plain(v, f"{key}.{k}".lstrip("."), depth + 1) for k, v in value.items()}
    legal = "text, finite numbers of at most 64 bits, true, false, and lists and tables of these"
    wrong = f"{shown(value)} is not allowed; must be made of {legal}, nested at most {MAX_OPTION_DEPTH} deep"
    raise Problem((key,), wrong)


def read_toml(source: str) -> dict[str, Any]:
    """Read a file's tables.

    Raises:
        ConfigError: whatever is wrong with the file.
    """
    data = read_file(Path(source), ".toml", 2**20, ConfigError)
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: not UTF-8 at line {line}; must be a UTF-8 text file") from None
    except (ValueError, RecursionError) as error:  # besides broken syntax, numbers with thousands of digits
        wrong = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{source}: not valid TOML: {wrong}") from None
