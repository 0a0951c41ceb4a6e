"""From TOML files and command lines to pydantic models, and from a model to its help. Knows no setting by name."""

import copy
import difflib
import functools
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ppo_tbptt.runtime.errors import InputError, printable, shorten

MAX_FILE_BYTES = 2**20
MAX_OPTION_DEPTH = 8
T = TypeVar("T", bound=BaseModel)
Node = dict[str, Any]
"""One field in JSON schema, with every reference in it resolved; empty where any value is accepted."""


class ConfigError(InputError):
    """Always one printable line: ``<source>: <key>: <value and what is wrong>; <remedy>``."""


class Problem(ValueError):
    """Something wrong at ``keys[0]`` of a table; where another of ``keys`` was typed, that one is named instead."""

    def __init__(self, keys: tuple[str, ...], text: str) -> None:
        super().__init__(printable(text))  # pydantic cannot hold lone surrogates
        self.keys, self.text = keys, text

    def at(self, source: str, typed: Mapping[str, str] | None = None) -> ConfigError:
        """The final error; ``typed`` maps overridden keys to ``<source>: <key as typed>``."""
        for key in self.keys:
            for name, place in (typed or {}).items():
                if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                    return ConfigError(f"{place}: {self.text}")
        return ConfigError(f"{source}: {shorten(self.keys[0])}: {self.text}")


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One setting in words; ``default`` as it would be written in TOML, or ``required``, or ``none``."""

    key: str
    type: str
    default: str
    help: str


# Trees: validated, overridden, merged


def validate(model: type[T], tree: Any, source: str, typed: Mapping[str, str] | None = None) -> T:
    """The model of ``tree``.

    Raises:
        ConfigError: the first thing that is wrong, blamed on ``source`` or on what was ``typed`` (see `Problem.at`).
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise explain(model, tree, error).at(source, typed) from None


def explain(model: type[BaseModel], tree: Any, error: ValidationError) -> Problem:
    """The first error in words, unknown keys before all others."""
    unknown = ("extra_forbidden", "invalid_key")
    first = min(error.errors(include_url=False), key=lambda details: details["type"] not in unknown)
    keys, node, value = (), fields(model), tree
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
    """The model of ``tree`` with dotted ``overrides`` over it, which changes ``tree``; see `Config.load`."""
    typed: dict[str, str] = {}
    for key, value in overrides.items():
        is_text = isinstance(value, str)
        place = f"command line: {flag(key)}" if is_text else f"override: {key}"
        try:
            keys, node, free = find(model, key, value, flag if is_text else str)
            typed[dotted(keys)] = place
            _assign(model, tree, keys, from_text(value, kinds(node), free) if is_text else value, free)
        except Problem as problem:
            raise problem.at("override", {problem.keys[0]: place}) from None
    return validate(model, tree, source, typed)


def merge(node: Node, tree: dict[str, Any], changes: Mapping[Any, Any]) -> dict[str, Any]:
    """``tree`` with ``changes`` at every depth, which changes ``tree``; None removes what is no field of its own."""
    for name, value in changes.items():
        inner = child(node, name)
        if isinstance(value, Mapping) and inner is not None:
            tree[name] = merge(inner, _table(inner, tree.get(name)), value)
        else:
            _set(tree, name, value, is_free=inner is not None and not _has_field(node, name))
    return tree


def _assign(model: type[BaseModel], tree: dict[str, Any], keys: tuple[str, ...], value: Any, free: bool) -> None:
    node = fields(model)
    for depth, name in enumerate(keys[:-1], 1):
        node = child(node, name) or {}
        before = tree.get(name)
        tree[name] = inner = _table(node, before)
        if before is not None and node and not inner and before != {}:
            raise Problem((dotted(keys[:depth]),), f"{shown(before)} is not allowed; must be {describe(node)}")
        tree = inner
    _set(tree, keys[-1], value, is_free=free)


def _set(tree: dict[str, Any], name: str, value: Any, *, is_free: bool) -> None:
    if value is None and is_free:
        tree.pop(name, None)
    else:
        tree[name] = value


def _table(node: Node, value: Any) -> dict[str, Any]:
    """``value`` as a table in which a part can be set: a number that may be one (a schedule) is its first part."""
    if "number" in kinds(node) and value is None:
        value = copy.deepcopy(node.get("default"))
    if "number" in kinds(node) and isinstance(value, int | float):
        return {next(iter(node["properties"])): value}
    return value if isinstance(value, dict) else {}


def plain(value: Any, key: str = "", depth: int = 1) -> Any:
    """A deep copy of what TOML, JSON and a checkpoint can all hold: text, numbers, booleans, lists, tables.

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
    """The file's tables.

    Raises:
        ConfigError: whatever is wrong with the file.
    """
    path = Path(source)
    try:
        if not path.is_file():
            raise ConfigError(f"{source}: {_no_file(path)}")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        if isinstance(error, ConfigError):
            raise
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
                example = flag(f"{key}.{next(iter(_alternatives(node)[0]['properties']))}")
                raise Problem((key,), f"is a table, not {shown(value)}; set its parts, like {example}")
            if not equals and value.startswith("--"):
                raise Problem((key,), f"has no value; must be followed by {describe(node)}")
            if key in found:
                raise Problem((key,), f"given twice, the second time as {shown(value)}; must be given once")
        except Problem as problem:
            raise ConfigError(f"command line: {shorten(name)}: {problem.text}") from None
        found[key] = value
    return found


def from_text(text: str, wanted: set[str], free: bool) -> Any:
    """A typed value: TOML, a bare word for text, ``1e6`` for a whole number, ``none`` for an optional value."""
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
    """``ppo.learning_rate`` as it is typed: ``--ppo.learning-rate``."""
    return "--" + key.replace("_", "-")


def dotted(keys: Sequence[str]) -> str:
    """A key as TOML would write it: a part that is no bare key is quoted."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k) else json.dumps(k, ensure_ascii=False) for k in keys)


# What a model accepts


@functools.cache
def fields(model: type[BaseModel]) -> Node:
    """The model's JSON schema, with every reference resolved."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        own = {key: resolve(value) for key, value in node.items() if key != "$ref"}
        return {**resolve(definitions[node["$ref"].rpartition("/")[2]]), **own} if "$ref" in node else own

    return resolve(schema)


def child(node: Node, name: Any) -> Node | None:
    """The field ``name`` of a table; None where there is none."""
    if not node:
        return {}
    if own := [option["properties"][name] for option in _alternatives(node) if _has_field(option, name)]:
        return own[0]
    extra = [option["additionalProperties"] for option in _alternatives(node) if option.get("additionalProperties")]
    return None if not extra else extra[0] if isinstance(extra[0], dict) else {}


def find(
    model: type[BaseModel], key: str, value: Any, spell: Callable[[str], str]
) -> tuple[tuple[str, ...], Node, bool]:
    """The parts of a dotted key, its field, and whether it is free: no field of its own, but an entry of a table.

    Raises:
        Problem: no such setting.
    """
    node, keys, rest, is_free = fields(model), (), key.split("."), False
    while rest:
        name, *rest = rest
        inner = child(node, name) if name else None
        if inner is None:
            keys = (*keys, name, *rest)
            text = f"unknown setting, with value {shown(value)}; {remedy(model, keys, spell)}"
            raise Problem((dotted(keys),), text)
        is_free = not _has_field(node, name)
        if isinstance(node.get("additionalProperties"), dict):  # its entries are values, whose names may have dots
            name, rest = ".".join((name, *rest)), []
        keys, node = (*keys, name), inner
    return keys, node, is_free


def _alternatives(node: Node) -> list[Node]:
    return node.get("anyOf", [node])


def _has_field(node: Node, name: Any) -> bool:
    return any(name in option.get("properties", {}) for option in _alternatives(node))


def is_table(node: Node) -> bool:
    """Whether a field is a ``[table]`` of fields; a schedule is a value, though it can be written as a table."""
    first = _alternatives(node)[0]
    return first.get("type") == "object" and "properties" in first


def kinds(node: Node) -> set[str]:
    """The types that a field takes, in JSON schema's words; none where it takes any."""
    types = (option.get("type", []) for option in _alternatives(node))
    return {kind for type_ in types for kind in ([type_] if isinstance(type_, str) else type_)}


def describe(node: Node) -> str:
    """What a field accepts, in words: ``a whole number from 1 to 65_536, or none``."""
    if "anyOf" in node:
        return ", or ".join(dict.fromkeys(map(describe, node["anyOf"])))
    if "enum" in node or "const" in node:
        legal = node.get("enum", [node.get("const")])
        return f"{'one of ' if len(legal) > 1 else ''}{', '.join(map(shown, legal))}{_like(node, ', or like ')}"
    types = node.get("type", [])
    return ", or ".join(_words(kind, node) for kind in ([types] if isinstance(types, str) else types)) or "a value"


def _words(kind: str, node: Node) -> str:
    match kind:
        case "integer":
            return f"a whole number{_span(node)}"
        case "number":
            return f"a number{_span(node)}"
        case "string":
            return f"text{_like(node, ' like ')}"
        case "array":
            least, most = node.get("minItems", 0), node.get("maxItems")
            number = least if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            return f"a list of {number}, each {describe((node.get('prefixItems') or [node.get('items', {})])[0])}"
        case "object":
            inner, parts = node.get("additionalProperties"), list(node.get("properties", {}))
            if isinstance(inner, dict) and inner:
                return f"a table, each value {describe(inner)}"
            return f"a table {{{', '.join(parts)}}}" if 0 < len(parts) <= 4 else "a table"
    return {"boolean": "true or false", "null": "none"}[kind]


def _span(node: Node) -> str:
    above, below = "exclusiveMinimum" in node, "exclusiveMaximum" in node
    low = node.get("exclusiveMinimum" if above else "minimum")
    high = node.get("exclusiveMaximum" if below else "maximum")
    low, high = (end if end is None or end != int(end) else f"{int(end):_}" for end in (low, high))
    start = "" if low is None else f" {'above' if above else 'from'} {low}"
    return start + ("" if high is None else f" {'up to but not including' if below else 'to'} {high}")


def _like(node: Node, before: str) -> str:
    return before + ", ".join(map(shown, node["examples"])) if "examples" in node else ""


def _walk(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Tables and fields under their dotted keys, in their order."""
    for name, inner in _alternatives(node)[0].get("properties", {}).items():
        yield prefix + name, inner
        if is_table(inner):
            yield from _walk(inner, f"{prefix}{name}.")


def describe_fields(model: type[BaseModel]) -> list[FieldHelp]:
    """See `config.describe_fields`."""
    return [
        FieldHelp(key, describe(node), _written(node), " ".join(node.get("description", "").split()))
        for key, node in _walk(fields(model))
        if not is_table(node)
    ]


def _written(node: Node) -> str:
    default = node.get("default")
    if isinstance(default, dict):
        return "{" + ", ".join(f"{name} = {shown(part)}" for name, part in default.items()) + "}"
    return shown(default) if "default" in node else "required"


def keys_marked(model: type[BaseModel], mark: str) -> frozenset[str]:
    """The dotted keys of fields and tables whose ``json_schema_extra`` has ``mark``."""
    return frozenset(key for key, node in _walk(fields(model)) if node.get(mark))


def remedy(model: type[BaseModel], keys: Sequence[str], spell: Callable[[str], str] = str) -> str:
    """The same name in another table, else the nearest name, else the names in this table."""
    known = list(_known(fields(model)))
    last = [name.rpartition(".")[2] for name in known]
    near = [name for name in known if name.rpartition(".")[2] == keys[-1] and name.count(".") <= 1][:3]
    near = near or difflib.get_close_matches(".".join(keys)[:120], known, n=1, cutoff=0.75)
    near = near or [known[last.index(n)] for n in difflib.get_close_matches(keys[-1][:120], last, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {' or '.join(map(spell, near))}?"
    inside = [name for name in known if name.rpartition(".")[0] == ".".join(keys[:-1])]
    inside = inside or [name for name in known if "." not in name]
    return f"must be one of {', '.join(map(spell, inside))}"


def _known(node: Node, prefix: str = "") -> Iterator[str]:
    for name, inner in _alternatives(node)[0].get("properties", {}).items():
        yield prefix + name
        yield from _known(inner, f"{prefix}{name}.")


def shown(value: Any) -> str:
    """A value as one would write it in TOML, and never long."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return shorten(json.dumps(value[:80], ensure_ascii=False))
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, list | tuple) and not any(isinstance(item, list | tuple | Mapping) for item in value[:8]):
        return f"[{', '.join(map(shown, value[:8]))}{', ...' if len(value) > 8 else ''}]"
    if isinstance(value, Mapping):
        return f"a table of {len(value)}"
    return {type(None): "none", list: "a nested list", tuple: "a nested list"}.get(type(value), type(value).__name__)
