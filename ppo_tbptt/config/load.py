"""From TOML files and command lines to pydantic models, with errors of one line. Knows no setting by name."""

import copy
import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ppo_tbptt.config.fields import Node, child, describe, dotted, is_table, kinds, remedy, schema_of, shown
from ppo_tbptt.runtime.errors import InputError, printable, shorten

MAX_FILE_BYTES = 2**20
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
        problem = explain(model, tree, error)
    for key in problem.keys:
        for name, place in (typed or {}).items():
            if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                raise ConfigError(f"{place}: {problem.text}")
    raise ConfigError(f"{source}: {shorten(problem.keys[0])}: {problem.text}")


def explain(model: type[BaseModel], tree: Any, error: ValidationError) -> Problem:
    """Say the first error in words, unknown keys before all others."""
    unknown = ("extra_forbidden", "invalid_key")
    first = min(error.errors(include_url=False), key=lambda details: details["type"] not in unknown)
    is_unknown, keys, node, value = first["type"] in unknown, (), schema_of(model), tree
    for name in first["loc"]:
        inner = {} if is_unknown and name == first["loc"][-1] else child(node, name)
        if inner is None or not isinstance(value, Mapping):
            break  # the rest names items of a list, or alternatives of a union
        keys, node, value = (*keys, str(name)), inner, value.get(name, {})
    if is_unknown:
        return Problem((dotted(keys),), f"unknown, with value {shown(value)}; {remedy(model, keys)}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Problem):
        return Problem(tuple(".".join(filter(None, (dotted(keys), key))) for key in cause.keys), cause.text)
    is_missing = first["type"] == "missing" and len(keys) == len(first["loc"])
    wrong = "missing" if is_missing else f"{shown(value)} is not allowed"
    return Problem((dotted(keys) or "config",), f"{wrong}; must be {describe(node)}")


def override(model: type[BaseModel], tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> Any:
    """Make the model of ``tree`` with dotted ``overrides`` over it; see `Config.load`. Changes ``tree``."""
    for name, node in schema_of(model)["properties"].items():
        if is_table(node) and not isinstance(tree.get(name, {}), dict):
            raise ConfigError(f"{source}: {name}: {shown(tree[name])} is not allowed; must be {describe(node)}")
    typed: dict[str, str] = {}
    for key, value in overrides.items():
        keys, node = _find(model, key, value)
        place = typed[dotted(keys)] = _place(key, value)
        if is_table(node) and isinstance(value, str):
            part = _flag(f"{key}.{next(iter(node['properties']))}")
            raise ConfigError(f"{place}: is a table, not {shown(value)}; set its parts, like {part}")
        change = _from_text(value, kinds(node), place) if isinstance(value, str) else value
        for name in reversed(keys):
            change = {name: change}
        merge(schema_of(model), tree, change, depth=len(keys))
    return validate(model, tree, source, typed)


def merge(node: Node, tree: dict[str, Any], changes: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    """Put ``changes`` into ``tree``: tables are merged down to ``depth``, and replaced from there on.

    None removes an entry that is no field, such as an environment's option.
    """
    for name, value in changes.items():
        inner = child(node, name)
        if depth > 1 and inner is not None and isinstance(value, Mapping):
            tree[name] = merge(inner, _table(inner, tree.get(name)), value, depth - 1)
        elif value is None and inner is not None and name not in node.get("properties", {}):
            tree.pop(name, None)
        else:
            tree[name] = value
    return tree


def _table(node: Node, value: Any) -> dict[str, Any]:
    """Return ``value`` as a table in which a part can be set: a schedule's number is its first part."""
    if {"number", "object"} <= {*kinds(node)}:
        value = copy.copy(node.get("default")) if value is None else value
        value = {next(iter(node["properties"])): value} if isinstance(value, int | float) else value
    return value if isinstance(value, dict) else {}


def plain(value: Any, key: str = "", depth: int = 1) -> Any:
    """Copy what TOML, JSON and a checkpoint can all hold: text, numbers, booleans, lists, tables.

    Raises:
        Problem: anything else in it; its key is relative to ``value``.
    """
    match value:
        case bool():
            return value
        case float() if math.isfinite(value):
            return value
        case int() if -(2**63) <= value < 2**63:
            return int(value)
        case str() if _encodable(value):
            return str(value)
        case list() | tuple() if depth <= MAX_OPTION_DEPTH:
            return [plain(item, key, depth + 1) for item in value]
        case Mapping() if depth <= MAX_OPTION_DEPTH and all(map(_encodable, value)):
            return {str(k): plain(v, f"{key}.{k}".lstrip("."), depth + 1) for k, v in value.items()}
    legal = "text, finite numbers of at most 64 bits, true, false, and lists and tables of these"
    wrong = f"{shown(value)} is not allowed; must be made of {legal}, nested at most {MAX_OPTION_DEPTH} deep"
    raise Problem((key,), wrong)


def _encodable(text: Any) -> bool:
    """Return False for lone surrogates, which no UTF-8 file can hold."""
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def read_toml(source: str) -> dict[str, Any]:
    """Read a file's tables.

    Raises:
        ConfigError: whatever is wrong with the file.
    """
    path = Path(source)
    try:
        if not path.is_file():
            raise ConfigError(f"{source}: {_no_file(path)}")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: is larger than {MAX_FILE_BYTES} bytes; must be a small TOML file")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{source}: not UTF-8 at line {line}; must be a UTF-8 text file") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply; must be tables of plain values") from None
    except ValueError as error:  # besides broken syntax, numbers with thousands of digits
        raise ConfigError(f"{source}: not valid TOML: {error}") from None


def _no_file(path: Path) -> str:
    if path.exists():
        return f"is {'a folder' if path.is_dir() else 'not a regular file'}; must be a TOML file"
    siblings = {file.stem: file for file in path.parent.glob("*.toml")} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(path.stem[:120], siblings, n=1)
    return f"no such file; {f'did you mean {siblings[near[0]]}?' if near else 'must be a TOML file'}"


def parse_overrides(model: type[BaseModel], argv: Sequence[str]) -> dict[str, str]:
    """Read `["--ppo.learning-rate", "1e-4", "--core.kind=lstm"]` as `{"ppo.learning_rate": "1e-4", ...}`.

    Raises:
        ConfigError: a token that is no setting, or a setting without a value or with two.
    """
    found: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not re.fullmatch(r"--\w\S*", name):
            raise ConfigError(f"command line: {shown(token)} is not expected here; must be --key value, or --key=value")
        key = name.removeprefix("--").replace("-", "_")
        value = value if equals else next(tokens, "--")
        _, node = _find(model, key, value)
        if not equals and value.startswith("--"):
            raise ConfigError(f"{_place(key, value)}: has no value; must be followed by {describe(node)}")
        if key in found:
            wrong = f"given twice, the second time as {shown(value)}; must be given once"
            raise ConfigError(f"{_place(key, value)}: {wrong}")
        found[key] = value
    return found


def _from_text(text: str, wanted: Sequence[str], place: str) -> Any:
    """Read a value as typed, of a field of the ``wanted`` kinds; see `Config.load`."""
    if text.lower() == "none" and "string" not in wanted:
        return None
    if "boolean" in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except (ValueError, RecursionError):
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise ConfigError(f"{place}: {shown(text)} is not valid TOML; must be like [1, 2] or {{a = 1}}") from None
        plain_number = re.fullmatch(r"[+-]?(\d+\.?|\.\d)\d*(e[+-]?\d+)?", text, re.ASCII)  # .5, 1. and 007 too
        value = float(text) if plain_number and {"integer", "number"} & {*wanted} else text
    if wanted == ["string"] and not isinstance(value, str):
        return text
    is_whole = "number" not in wanted and isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and "integer" in wanted else value


def _flag(key: str) -> str:
    """Spell ``ppo.learning_rate`` as it is typed: ``--ppo.learning-rate``."""
    return "--" + key.replace("_", "-")


def _place(key: str, value: Any) -> str:
    return shorten(f"command line: {_flag(key)}" if isinstance(value, str) else f"override: {key}")


def _find(model: type[BaseModel], key: str, value: Any) -> tuple[tuple[str, ...], Node]:
    """Return the parts of a dotted key that is set to ``value``, and its field.

    Raises:
        ConfigError: no such setting.
    """
    node, keys, rest = schema_of(model), (), key.split(".")
    while rest:
        if isinstance(node.get("additionalProperties"), dict):  # its entries are values, whose names may have dots
            rest = [".".join(rest)]
        name, *rest = rest
        inner = child(node, name) if name else None
        if inner is None:
            near = remedy(model, (*keys, name, *rest), _flag if isinstance(value, str) else str)
            raise ConfigError(f"{_place(key, value)}: unknown setting, with value {shown(value)}; {near}")
        keys, node = (*keys, name), inner
    return keys, node
