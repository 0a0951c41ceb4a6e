"""What a pydantic model accepts, read from its JSON schema: its keys, their types in words, what is near a wrong key.

Knows no setting by name.
"""

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from ppo_tbptt.runtime.errors import shorten

Node = dict[str, Any]
"""A field in JSON schema, with every reference in it resolved; empty where any value is accepted."""


class FieldHelp(NamedTuple):
    """A setting in words; ``default`` as it would be written in TOML, or ``required``, or ``none``."""

    key: str
    type: str
    default: str
    help: str


def describe_fields(model: type[BaseModel]) -> list[FieldHelp]:
    """List every setting with its type, default and help, in the order of the tables."""
    return [
        FieldHelp(key, describe(node), _default(node), " ".join(node.get("description", "").split()))
        for key, node in _walk(schema_of(model))
        if not is_table(node)
    ]


def _default(node: Node) -> str:
    default = node.get("default")
    if isinstance(default, dict):
        return "{" + ", ".join(f"{name} = {shown(part)}" for name, part in default.items()) + "}"
    return shown(default) if "default" in node else "required"


def keys_marked(model: type[BaseModel], mark: str) -> frozenset[str]:
    """Return the dotted keys of fields and tables whose ``json_schema_extra`` has ``mark``."""
    return frozenset(key for key, node in _walk(schema_of(model)) if node.get(mark))


@functools.cache
def schema_of(model: type[BaseModel]) -> Node:
    """Return the model's JSON schema, with every reference resolved."""
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
    """Return what a table accepts under ``name``: its field, or its entry where names are free; else None."""
    if name in node.get("properties", {}):
        return node["properties"][name]
    entry = node.get("additionalProperties", not node)
    return {} if entry is True else entry or None


def is_table(node: Node) -> bool:
    """Return whether a field is a ``[table]``; a schedule is a value, though it can be written as a table."""
    return node.get("type") == "object" and "properties" in node


def kinds(node: Node) -> list[str]:
    """Return the types that a field takes, in JSON schema's words; none where it takes any."""
    listed = [option.get("type", []) for option in node.get("anyOf", [node])]
    return [kind for types in listed for kind in ([types] if isinstance(types, str) else types)]


def _walk(node: Node, prefix: str = "", *, schedules: bool = False) -> Iterator[tuple[str, Node]]:
    """Yield tables and fields, and the parts of ``schedules`` too, with their dotted keys, in their order."""
    for name, inner in node.get("properties", {}).items():
        yield prefix + name, inner
        if schedules or is_table(inner):
            yield from _walk(inner, f"{prefix}{name}.", schedules=schedules)


def describe(node: Node) -> str:
    """Say what a field accepts: ``a whole number from 1 to 65_536, or none``."""
    if "anyOf" in node:
        return ", or ".join(dict.fromkeys(map(describe, node["anyOf"])))
    examples = ", ".join(map(shown, node.get("examples", [])))
    if "enum" in node or "const" in node:
        legal = node.get("enum", [node.get("const")])
        others = f", or like {examples}" if examples else ""
        return f"{'one of ' if len(legal) > 1 else ''}{', '.join(map(shown, legal))}{others}"
    words = {
        "boolean": "true or false",
        "integer": f"a whole number{_span(node)}",
        "null": "none",
        "number": f"a number{_span(node)}",
        "string": f"text like {examples}" if examples else "text",
    }
    return ", or ".join(words.get(kind) or _describe_inner(kind, node) for kind in kinds(node)) or "a value"


def _describe_inner(kind: str, node: Node) -> str:
    if kind == "array":
        least, most = node.get("minItems", 0), node.get("maxItems")
        number = least if least == most else f"at least {least}" if most is None else f"{least} to {most}"
        return f"a list of {number}, each {describe((node.get('prefixItems') or [node.get('items', {})])[0])}"
    inner, parts = node.get("additionalProperties"), list(node.get("properties", {}))
    if isinstance(inner, dict):
        return f"a table, each value {describe(inner)}"
    return f"a table {{{', '.join(parts)}}}" if 0 < len(parts) <= 4 else "a table"


def _span(node: Node) -> str:
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "up to but not including",
    }
    ends = {word: node[bound] for bound, word in words.items() if bound in node}
    return "".join(f" {word} {f'{int(end):_}' if end == int(end) else end}" for word, end in ends.items())


def remedy(model: type[BaseModel], keys: Sequence[str], spell: Callable[[str], str] = str) -> str:
    """Name what an unknown key may mean: the same name in another table, else the nearest, else all in its table."""
    known = [key for key, _ in _walk(schema_of(model), schedules=True)]
    near = [key for key in known if key.rpartition(".")[2] == keys[-1] and key.count(".") <= 1][:3]
    near = near or difflib.get_close_matches(".".join(keys)[:120], known, n=1, cutoff=0.75)
    by_name = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = near or [by_name[name] for name in difflib.get_close_matches(keys[-1][:120], by_name, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {' or '.join(map(spell, near))}?"
    inside = [key for key in known if key.rpartition(".")[0] == ".".join(keys[:-1])]
    return f"must be one of {', '.join(map(spell, inside or [key for key in known if '.' not in key]))}"


def dotted(keys: Sequence[str]) -> str:
    """Write a key as TOML would: a part that is no bare key is quoted."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k) else json.dumps(k, ensure_ascii=False) for k in keys)


def shown(value: Any) -> str:
    """Write a value as TOML would, and never long."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return shorten(json.dumps(value[:80], ensure_ascii=False))
        case int() if value.bit_length() > 64:
            return f"a number of {value.bit_length()} bits"
        case int() | float():
            return repr(value)
        case list() | tuple():
            items = ["a list" if isinstance(item, list | tuple) else shown(item) for item in value[:8]]
            return f"[{', '.join(items)}{', ...' if len(value) > 8 else ''}]"
        case Mapping():
            return f"a table of {len(value)}"
    return type(value).__name__
