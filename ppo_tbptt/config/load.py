"""From files and command lines to a config, and from a config class to its help. Knows no setting by name."""

import ast
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ppo_tbptt.config.tree import assign, bare, blame, checked_tree, fields_of, lookup
from ppo_tbptt.config.values import (
    ConfigError,
    Problem,
    Schedule,
    Table,
    construct,
    describe,
    plain_tree,
    shorten,
    shown,
    table_type,
)

MAX_FILE_BYTES = 2**20
T = TypeVar("T", bound=Table)


@dataclasses.dataclass(frozen=True, slots=True)
class FieldHelp:
    """One setting in words; `default` as it would be written in TOML, or `required`, or `none`."""

    key: str
    type: str
    default: str
    help: str


def load(cls: type[T], path: str | os.PathLike[str], overrides: Mapping[str, Any]) -> T:
    """See `Config.load`."""
    source = os.fspath(path)
    return override(cls, read_toml(source), overrides, source)


def override(cls: type[T], content: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> T:
    """The config of the tree ``content`` with dotted ``overrides`` over it; ``source`` is blamed for the tree."""
    with blame(source):
        tree = checked_tree(cls, content)
    typed: dict[str, str] = {}
    for key, value in overrides.items():
        typed[key] = f"command line: {flag(key)}" if isinstance(value, str) else f"override: {key}"
        with blame("override", {key: typed[key]}):
            keys = tuple(key.split("."))
            hint = lookup(cls, keys, value)
            assign(cls, tree, keys, from_text(key, value, hint) if isinstance(value, str) else value)
    with blame(source, typed):
        return construct(cls, tree)


def read_toml(source: str) -> dict[str, Any]:
    """The file's tables; whatever is wrong with it is a `ConfigError`."""
    try:
        data = _read_bytes(Path(source))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
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


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ConfigError("is a folder; must be a TOML file")
    if not path.exists():
        siblings = {file.stem: file for file in path.parent.glob("*.toml")} if path.parent.is_dir() else {}
        near = difflib.get_close_matches(path.stem[:120], siblings, n=1)
        raise ConfigError(f"no such file; {f'did you mean {siblings[near[0]]}?' if near else 'must be a TOML file'}")
    if not path.is_file():
        raise ConfigError("is not a regular file; must be a TOML file")
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def parse_overrides(cls: type[Table], argv: Sequence[str]) -> dict[str, str]:
    """See `config.parse_overrides`."""
    found: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, has_value, value = token.partition("=")
        if not re.fullmatch(r"--\w[^\s]*", name):
            raise ConfigError(f"command line: {shown(token)} is not expected here; must be --key value, or --key=value")
        keys = tuple(name.removeprefix("--").replace("-", "_").split("."))
        if not has_value:
            value = next(tokens, "--")
        key = ".".join(keys)
        try:
            hint = lookup(cls, keys, value, flag)
            if table := table_type(hint):
                example = flag(f"{key}.{next(iter(fields_of(table)))}")
                raise Problem((key,), f"is a table, not {shown(value)}; set its parts, like {example}")
            if not has_value and value.startswith("--"):
                raise Problem((key,), f"has no value; must be followed by {describe(hint)}")
            if key in found:
                raise Problem((key,), f"given twice, the second time as {shown(value)}; must be given once")
        except Problem as problem:
            raise ConfigError(f"command line: {shorten(name)}: {problem.text}") from None
        found[key] = value
    return found


def from_text(key: str, text: str, hint: Any) -> Any:
    """A typed value: TOML, a bare word for text, `1e6` for a whole number, `none` for an optional value."""
    kinds = _kinds(hint)
    if text.lower() == "none" and (type(None) in kinds or hint is Any):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except (ValueError, RecursionError):
        if text.lstrip()[:1] in ("[", "{", '"', "'"):
            raise Problem((key,), f"{shown(text)} is not valid TOML; must be like [1, 2], {{a = 1}} or text") from None
        plain_number = re.fullmatch(r"[+-]?(\d+\.?|\.\d)\d*(e[+-]?\d+)?", text, re.ASCII)  # .5, 1. and 007 too
        value = float(text) if plain_number and kinds & {int, float, Schedule} else text
    if kinds == {str} and not isinstance(value, str):
        return text
    whole = int in kinds and float not in kinds and isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def describe_fields(cls: type[Table], prefix: str = "") -> list[FieldHelp]:
    """See `config.describe_fields`."""
    rows: list[FieldHelp] = []
    docs = _field_docs(cls.__module__).get(cls.__name__, {})
    for name, field in fields_of(cls).items():
        if inner := table_type(field.type):
            rows += describe_fields(inner, f"{prefix}{name}.")
        else:
            default = _written(field.default, field.default_factory)
            rows.append(FieldHelp(prefix + name, describe(field.type), default, docs.get(name, "")))
    return rows


def _written(default: Any, factory: Any) -> str:
    if default is dataclasses.MISSING:
        return "required" if factory is dataclasses.MISSING else "{}"
    value = plain_tree(default)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {shown(part)}" for name, part in value.items()) + "}"
    return shown(value)


@functools.cache
def _field_docs(module: str) -> dict[str, dict[str, str]]:
    """{class: {field: the string under it}}, read from the source; empty where there is none."""
    try:
        body = ast.parse(inspect.getsource(sys.modules[module])).body
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    docs: dict[str, dict[str, str]] = {}
    for node in (n for n in body if isinstance(n, ast.ClassDef)):
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
                text = ast.literal_eval(after.value) if isinstance(after.value, ast.Constant) else ""
                docs.setdefault(node.name, {})[field.target.id] = inspect.cleandoc(str(text))
    return docs


def _kinds(hint: Any) -> set[Any]:
    """The types of a union, without their bounds; Literal counts as text."""
    hint = bare(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    return {str} if get_origin(hint) is Literal else {hint}
