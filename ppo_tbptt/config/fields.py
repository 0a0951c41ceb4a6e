"""What a pydantic model accepts, read from its JSON schema: its keys, their types in words, what is near a wrong key.

Knows no setting by name.
"""

import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from ppo_tbptt.runtime.errors import shorten

Node = dict[str, Any]
"""One field in JSON schema, with every reference in it resolved; empty where any value is accepted."""


@dataclass(frozen=True, slots=True)
class FieldHelp:
    """One setting in words; ``default`` as it would be written in TOML, or ``required``, or ``none``."""

    key: str
    type: str
    default: str
    help: str


def describe_fields(model: type[BaseModel]) -> list[FieldHelp]:
    """List every setting with its type, default and help, in the order of the tables."""
    return [
        FieldHelp(key, describe(node), _written(node), " ".join(node.get("description", "").split()))
        for key, node in _walk(schema_of(model), is_table)
        if not is_table(node)
    ]


def _written(node: Node) -> str:
    default = node.get("default")
    if isinstance(default, dict):
        return "{" + ", ".join(f"{name} = {shown(part)}" for name, part in default.items()) + "}"
    return shown(default) if "default" in node else "required"


def keys_marked(model: type[BaseModel], mark: str) -> frozenset[str]:
    """Return the dotted keys of fields and tables whose ``json_schema_extra`` has ``mark``."""
    return frozenset(key for key, node in _walk(schema_of(model), is_table) if node.get(mark))


# Fields as JSON schema


@functools.cache
def schema_of(model: type[BaseModel]) -> Node:
    """Make the model's JSON schema, with every reference resolved."""
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
    """Return the field ``name`` of a table; None where there is none."""
    if own := [option["properties"][name] for option in _alternatives(node) if has_field(option, name)]:
        return own[0]
    extra = [option["additionalProperties"] for option in _alternatives(node) if option.get("additionalProperties")]
    return {} if not node or extra[:1] == [True] else next(iter(extra), None)


def has_field(node: Node, name: Any) -> bool:
    """Whether ``name`` is a field of a table, and not an entry that may as well be absent."""
    return any(name in option.get("properties", {}) for option in _alternatives(node))


def is_table(node: Node) -> bool:
    """Whether a field is a ``[table]`` of fields; a schedule is a value, though it can be written as a table."""
    first = _alternatives(node)[0]
    return first.get("type") == "object" and "properties" in first


def kinds(node: Node) -> set[str]:
    """Return the types that a field takes, in JSON schema's words; none where it takes any."""
    return {kind for option in _alternatives(node) for kind in _types(option)}


def _types(node: Node) -> list[str]:
    types = node.get("type", [])
    return [types] if isinstance(types, str) else types


def _alternatives(node: Node) -> list[Node]:
    return node.get("anyOf", [node])


def _walk(node: Node, enters: Callable[[Node], bool], prefix: str = "") -> Iterator[tuple[str, Node]]:
    """List tables and fields under dotted keys, in their order; what is in one only where ``enters`` says so."""
    for name, inner in _alternatives(node)[0].get("properties", {}).items():
        yield prefix + name, inner
        if enters(inner):
            yield from _walk(inner, enters, f"{prefix}{name}.")


# Words


def describe(node: Node) -> str:
    """Say what a field accepts: ``a whole number from 1 to 65_536, or none``."""
    if "anyOf" in node:
        return ", or ".join(dict.fromkeys(map(describe, node["anyOf"])))
    if "enum" in node or "const" in node:
        legal = node.get("enum", [node.get("const")])
        return f"{'one of ' if len(legal) > 1 else ''}{', '.join(map(shown, legal))}{_like(node, ', or like ')}"
    return ", or ".join(_words(kind, node) for kind in _types(node)) or "a value"


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
            if isinstance(inner, dict):
                return f"a table, each value {describe(inner)}"
            return f"a table {{{', '.join(parts)}}}" if 0 < len(parts) <= 4 else "a table"
    return {"boolean": "true or false", "null": "none"}[kind]


def _span(node: Node) -> str:
    words = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "to",
        "exclusiveMaximum": "up to but not including",
    }
    ends = {word: node[bound] for bound, word in words.items() if bound in node}
    return "".join(f" {word} {f'{int(end):_}' if end == int(end) else end}" for word, end in ends.items())


def _like(node: Node, before: str) -> str:
    return before + ", ".join(map(shown, node["examples"])) if "examples" in node else ""


def remedy(model: type[BaseModel], keys: Sequence[str], spell: Callable[[str], str] = str) -> str:
    """Name what an unknown key may mean: the same name in another table, else the nearest, else all in this table."""
    known = [key for key, _ in _walk(schema_of(model), lambda _: True)]
    last = [name.rpartition(".")[2] for name in known]
    near = [name for name in known if name.rpartition(".")[2] == keys[-1] and name.count(".") <= 1][:3]
    near = near or difflib.get_close_matches(".".join(keys)[:120], known, n=1, cutoff=0.75)
    near = near or [known[last.index(n)] for n in difflib.get_close_matches(keys[-1][:120], last, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {' or '.join(map(spell, near))}?"
    inside = [name for name in known if name.rpartition(".")[0] == ".".join(keys[:-1])]
    return f"must be one of {', '.join(map(spell, inside or [name for name in known if '.' not in name]))}"


def dotted(keys: Sequence[str]) -> str:
    """Write a key as TOML would: a part that is no bare key is quoted."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k) else json.dumps(k, ensure_ascii=False) for k in keys)


def shown(value: Any) -> str:
    """Write a value as TOML would, and never long."""
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
