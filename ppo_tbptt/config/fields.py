"""What a pydantic model accepts, from its JSON schema: its keys, their types in words, what is near a wrong key."""

import difflib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from ppo_tbptt.runtime.errors import shorten

Node = dict[str, Any]
"""A field in JSON schema, with every reference in it resolved; empty where any value is accepted."""
_NOUNS = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
_NOUNS |= {"array": "a list", "object": "a table", "null": "none"}
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "minItems": "of at least", "maxItems": "and at most"}
_BOUNDS |= {"maximum": "to", "exclusiveMaximum": "up to but not including"}


class FieldHelp(NamedTuple):
    """A setting in words; ``default`` as it would be written in TOML, or ``required``, or ``none``."""

    key: str
    type: str
    default: str
    help: str


def describe_fields(model: type[BaseModel]) -> list[FieldHelp]:
    """List every setting with its type, default and help, in the order of the tables."""
    nodes = dict(_walk(schema_of(model)))
    parts = [key for key in nodes if "." in key and kinds(nodes[key.rpartition(".")[0]]) != ["object"]]  # of schedules
    return [
        FieldHelp(
            key,
            describe(node),
            shown(node["default"]) if "default" in node else "required",
            re.sub(r"\n(?!- )", " ", node.get("description", "")),  # lists keep their lines
        )
        for key, node in nodes.items()
        if key not in parts and (kinds(node) != ["object"] or "properties" not in node)
    ]


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
        referred = definitions[node["$ref"].rpartition("/")[2]] if "$ref" in node else {}
        return {key: resolve(inner) for key, inner in (referred | node).items() if key != "$ref"}

    return resolve(schema)


def _walk(node: Node, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Yield tables, fields and the parts of schedules with their dotted keys, in their order."""
    for name, inner in node.get("properties", {}).items():
        yield prefix + name, inner
        yield from _walk(inner, f"{prefix}{name}.")


def child(node: Node, name: Any) -> Node:
    """Return what a table accepts under ``name``: its field, or its entry where names are free."""
    entry = node.get("additionalProperties")
    return node.get("properties", {}).get(name) or (entry if isinstance(entry, dict) else {})


def kinds(node: Node) -> list[str]:
    """Return the types that a field takes, in JSON schema's words; empty text where it takes any."""
    types = [option.get("type", "") for option in node.get("anyOf", [node])]
    return types[0] if isinstance(types[0], list) else types


def describe(node: Node) -> str:
    """Say what a field accepts: ``a whole number from 1 to 65_536, or none``."""
    options = node.get("anyOf") or [{**node, "type": kind} for kind in kinds(node)]
    if len(options) > 1:
        return ", or ".join(map(describe, options))
    notes = [f" {word} {node[bound]:_.16g}" for bound, word in _BOUNDS.items() if bound in node]
    text, parts = _NOUNS.get(node.get("type", ""), "a value"), node.get("properties")
    if node.get("type") == "object":
        notes = [f" {{{', '.join(parts)}}}"] if parts else []
    if "enum" in node or "const" in node:
        text = f"one of {', '.join(map(shown, node['enum']))}" if "enum" in node else shown(node["const"])
    if items := (node.get("prefixItems") or [node.get("items") or child(node, ...)])[0]:
        notes.append(f", each {describe(items)}")
    if "examples" in node:
        notes.append(f"{', or' * ('enum' in node)} like {', '.join(map(shown, node['examples']))}")
    return text + "".join(notes)


def remedy(model: type[BaseModel], keys: Sequence[str]) -> str:
    """Say what an unknown key may mean: the nearest name, in its table or in others, else all in its table."""
    known = [key for key, _ in _walk(schema_of(model))]
    table, _, name = ".".join(keys).rpartition(".")
    near = difflib.get_close_matches(name[:120], [key.rpartition(".")[2] for key in known], 1, 0.75)
    inside = [key for key in known if key.rpartition(".")[0] == table]
    if alike := [key for key in known if key.rpartition(".")[2] in near]:
        return f"did you mean {' or '.join([key for key in alike if key in inside] or alike[:3])}?"
    return f"must be one of {', '.join(inside or [key for key in known if '.' not in key])}"


def dotted(keys: Sequence[str]) -> str:
    """Write a key as TOML would: a part that is no bare key is quoted."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k) else json.dumps(k, ensure_ascii=False) for k in keys)


def shown(value: Any) -> str:
    """Write a value about as TOML would, and never long."""
    if value is None or isinstance(value, float):
        return str(value).lower()
    try:
        text = json.dumps(value, ensure_ascii=False, default=lambda other: f"<{type(other).__name__}>")
    except (TypeError, ValueError, RecursionError):  # thousands of digits, keys that are no text, deep nesting
        text = f"<{type(value).__name__}>"
    return shorten(re.sub(r'"([\w-]+)": ', r"\1 = ", text))
