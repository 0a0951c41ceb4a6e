"""From TOML files and command lines to pydantic models, with errors of one line. Knows no setting by name."""

import copy
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ppo_tbptt.config.fields import (
    Node,
    child,
    describe,
    describe_fields,
    dotted,
    has_field,
    is_table,
    kinds,
    remedy,
    schema_of,
    shown,
)
from ppo_tbptt.runtime.errors import InputError, printable, shorten

MAX_FILE_BYTES = 2**20
MAX_OPTION_DEPTH = 8
T = TypeVar("T", bound=BaseModel)


class ConfigError(InputError):
    """Always one printable line: ``<source>: <key>: <value and what is wrong>; <remedy>``."""


class Problem(ValueError):
    """Something wrong at ``keys[0]`` of a table; where another of ``keys`` was typed, that one is named instead."""

    def __init__(self, keys: tuple[str, ...], text: str) -> None:
        super().__init__(printable(text))  # pydantic cannot hold lone surrogates
        self.keys, self.text = keys, text

    def at(self, source: str, typed: Mapping[str, str] | None = None) -> ConfigError:
        """Make the final error; ``typed`` maps overridden keys to ``<source>: <key as typed>``."""
        for key in self.keys:
            for name, place in (typed or {}).items():
                if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                    return ConfigError(f"{place}: {self.text}")
        return ConfigError(f"{source}: {shorten(self.keys[0])}: {self.text}")


# Trees: validated, overridden, merged


def validate(model: type[T], tree: Any, source: str, typed: Mapping[str, str] | None = None) -> T:
    """Make the model of ``tree``.

    Raises:
        ConfigError: the first thing that is wrong, blamed on ``source`` or on what was ``typed`` (see `Problem.at`).
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise explain(model, tree, error).at(source, typed) from None


def explain(model: type[BaseModel], tree: Any, error: ValidationError) -> Problem:
    """Say the first error in words, unknown keys before all others."""
    unknown = ("extra_forbidden", "invalid_key")
    first = min(error.errors(include_url=False), key=lambda details: details["type"] not in unknown)
    keys, node, value = (), schema_of(model), tree
    path = first["loc"][:-1] if first["type"] in unknown else first["loc"]
    for name in path:
        inner = child(node, name)
        if inner is None or not isinstance(value, dict):
            break  # the rest names items of a list, or alternatives of a union
        keys, node, value = (*keys, str(name)), inner, value.get(name, {})
    if first["type"] in unknown:
        name = first["loc"][-1]
        keys = (*keys, str(name))
        return Problem((dotted(keys),), f"unknown, with value {shown(value.get(name))}; {remedy(model, keys)}")
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Problem):
        return Problem(tuple(".".join(filter(None, (dotted(keys), key))) for key in cause.keys), cause.text)
    is_missing = first["type"] == "missing" and len(keys) == len(path)
    wrong = "missing" if is_missing else f"{shown(value)} is not allowed"
    return Problem((dotted(keys) or "config",), f"{wrong}; must be {describe(node)}")


def override(model: type[T], tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> T:
    """Make the model of ``tree`` with dotted ``overrides`` over it; see `Config.load`. Changes ``tree``."""
    for name, node in schema_of(model)["properties"].items():
        if is_table(node) and not isinstance(tree.get(name, {}), dict):
            wrong = f"{shown(tree[name])} is not allowed; must be {describe(node)}"
            raise Problem((name,), wrong).at(source)
    typed: dict[str, str] = {}
    for key, value in overrides.items():
        is_text = isinstance(value, str)
        place = f"command line: {flag(key)}" if is_text else f"override: {key}"
        try:
            keys, node, is_free = find(model, key, value, flag if is_text else str)
            change = from_text(value, kinds(node), is_free) if is_text else value
        except Problem as problem:
            raise ConfigError(f"{place}: {problem.text}") from None
        for name in reversed(keys):
            change = {name: change}
        merge(schema_of(model), tree, change, depth=len(keys))
        typed[dotted(keys)] = place
    return validate(model, tree, source, typed)


def merge(node: Node, tree: dict[str, Any], changes: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    """Put ``changes`` into ``tree``: tables are merged down to ``depth``, and replaced from there on.

    None removes an entry that is no field, such as an environment's option.
    """
    for name, value in changes.items():
        inner = child(node, name)
        if depth > 1 and inner is not None and isinstance(value, Mapping):
            tree[name] = merge(inner, _table(inner, tree.get(name)), value, depth - 1)
        elif value is None and inner is not None and not has_field(node, name):
            tree.pop(name, None)
        else:
            tree[name] = value
    return tree


def _table(node: Node, value: Any) -> dict[str, Any]:
    """Return ``value`` as a table in which a part can be set: a schedule's number is its first part."""
    if "number" in kinds(node):
        value = copy.deepcopy(node.get("default")) if value is None else value
        value = {next(iter(node["properties"])): value} if isinstance(value, int | float) else value
    return value if isinstance(value, dict) else {}


def plain(value: Any, key: str = "", depth: int = 1) -> Any:
    """Copy what TOML, JSON and a checkpoint can all hold: text, numbers, booleans, lists, tables.

    Raises:
        Problem: anything else in it; its key is relative to ``value``.
    """
    if isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and _encodable(value):
        return str(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if depth <= MAX_OPTION_DEPTH and isinstance(value, list | tuple):
        return [plain(item, key, depth + 1) for item in value]
    if depth <= MAX_OPTION_DEPTH and isinstance(value, Mapping) and all(map(_encodable, value)):
        return {str(k): plain(v, f"{key}.{k}".lstrip("."), depth + 1) for k, v in value.items()}
    legal = "text, finite numbers of at most 64 bits, true, false, and lists and tables of these"
    wrong = f"{shown(value)} is not allowed; must be made of {legal}, nested at most {MAX_OPTION_DEPTH} deep"
    raise Problem((key,), wrong)


def _encodable(text: Any) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


# Files and command lines


def read_toml(source: str) -> dict[str, Any]:
    """Read the file's tables.

    Raises:
        ConfigError: whatever is wrong with the file.
    """
    path, data = Path(source), b""
    try:
        problem = "" if path.is_file() else _no_file(path)
        if not problem:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        problem = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if len(data) > MAX_FILE_BYTES:
        problem = f"is larger than {MAX_FILE_BYTES} bytes; must be a small TOML file"
    if problem:
        raise ConfigError(f"{source}: {problem}")
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
    """See `config.parse_overrides`."""
    found: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not re.fullmatch(r"--\w[^\s]*", name):
            raise ConfigError(f"command line: {shown(token)} is not expected here; must be --key value, or --key=value")
        key = name.removeprefix("--").replace("-", "_")
        value = value if equals else next(tokens, "--")
        try:
            _, node, _ = find(model, key, value, flag)
            if is_table(node):
                part = next(help.key for help in describe_fields(model) if help.key.startswith(f"{key}."))
                raise Problem((key,), f"is a table, not {shown(value)}; set its parts, like {flag(part)}")
            if not equals and value.startswith("--"):
                raise Problem((key,), f"has no value; must be followed by {describe(node)}")
            if key in found:
                raise Problem((key,), f"given twice, the second time as {shown(value)}; must be given once")
        except Problem as problem:
            raise ConfigError(f"command line: {shorten(name)}: {problem.text}") from None
        found[key] = value
    return found


def from_text(text: str, wanted: set[str], free: bool) -> Any:
    """Read a value as typed: TOML, a bare word for text, ``1e6`` for a whole number, ``none`` for an optional value."""
    if text.lower() == "none" and (free or "null" in wanted):
        return None
    if "boolean" in wanted and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except (ValueError, RecursionError):
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise Problem(("",), f"{shown(text)} is not valid TOML; must be like [1, 2], {{a = 1}} or text") from None
        plain_number = re.fullmatch(r"[+-]?(\d+\.?|\.\d)\d*(e[+-]?\d+)?", text, re.ASCII)  # .5, 1. and 007 too
        value = float(text) if plain_number and wanted & {"integer", "number"} else text
    if wanted == {"string"} and not isinstance(value, str):
        return text
    is_whole = "integer" in wanted and "number" not in wanted and isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


def flag(key: str) -> str:
    """Spell ``ppo.learning_rate`` as it is typed: ``--ppo.learning-rate``."""
    return "--" + key.replace("_", "-")


Found = tuple[tuple[str, ...], Node, bool]


def find(model: type[BaseModel], key: str, value: Any, spell: Callable[[str], str]) -> Found:
    """Return the parts of a dotted key, its field, and whether it is no field but an entry of a table (an option).

    Raises:
        Problem: no such setting.
    """
    node, keys, rest, is_free = schema_of(model), (), key.split("."), False
    while rest:
        name, *rest = rest
        inner = child(node, name) if name else None
        if inner is None:
            near = remedy(model, (*keys, name, *rest), spell)
            raise Problem((key,), f"unknown setting, with value {shown(value)}; {near}")
        is_free = not has_field(node, name)
        if isinstance(node.get("additionalProperties"), dict):  # its entries are values, whose names may have dots
            name, rest = ".".join((name, *rest)), []
        keys, node = (*keys, name), inner
    return keys, node, is_free
