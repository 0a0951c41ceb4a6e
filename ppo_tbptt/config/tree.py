"""A plain tree and the class it is for: which keys exist, setting one leaf, merging many, and whom to blame."""

import contextlib
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from ppo_tbptt.config.values import (
    ConfigError,
    Problem,
    Schedule,
    Table,
    convert,
    plain_options,
    plain_tree,
    shorten,
    shown,
    table_type,
)

KeyPath = tuple[str, ...]


@contextlib.contextmanager
def blame(source: str, typed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turn a `Problem` into the final `ConfigError`; `typed` maps overridden keys to `<source>: <key as typed>`."""
    try:
        yield
    except Problem as problem:
        for key in problem.keys:
            for name, place in (typed or {}).items():
                if f"{key}.".startswith(f"{name}.") or f"{name}.".startswith(f"{key}."):
                    raise ConfigError(f"{place}: {problem.text}") from None
        raise ConfigError(f"{source}: {shorten(problem.keys[0])}: {problem.text}") from None


def checked_tree(cls: type[Table], tree: Any) -> dict[str, Any]:
    """Every key known and every value converted; what combinations allow is left to `construct`."""
    if not isinstance(tree, Mapping):
        raise Problem(("config",), f"{shown(tree)} is not allowed; must be a table")
    return merged(cls, {}, tree, deep=False)


def merged(cls: type[Table], base: dict[str, Any], changes: Mapping[Any, Any], deep: bool = True) -> dict[str, Any]:
    """`base` with the leaves of `changes`; schedules and options are merged when `deep`, else replaced."""
    for keys, value in _leaves(cls, changes, deep):
        assign(cls, base, keys, value)
    return base


def _leaves(hint: Any, tree: Mapping[Any, Any], deep: bool) -> Iterator[tuple[KeyPath, Any]]:
    fields = fields_of(hint)
    for name, value in tree.items():
        inner = bare(fields[name].type) if name in fields else None
        branches = table_type(inner) or (deep and (inner is Schedule or get_origin(inner) is dict))
        if branches and isinstance(value, Mapping):
            yield from (((str(name), *rest), v) for rest, v in _leaves(inner, value, deep))
        else:
            yield (str(name),), value


def lookup(cls: type[Table], keys: KeyPath, value: Any, spell: Callable[[str], str] = str) -> Any:
    """The type wanted at a key; `Any` inside free options."""
    hint: Any = cls
    for name in keys:
        if get_origin(bare(hint)) is dict and name:
            return Any
        if name not in fields_of(hint):
            remedy = _remedy(cls, keys, spell)
            raise Problem((dotted(keys),), f"unknown setting, with value {shown(value)}; {remedy}")
        hint = fields_of(hint)[name].type
    return hint


def assign(cls: type[Table], tree: dict[str, Any], keys: KeyPath, value: Any) -> None:
    """Set one checked leaf. Inside a schedule the other parts stay; a None inside the options removes one."""
    hint, key = lookup(cls, keys, value), dotted(keys)
    node: dict[str, Any] = tree
    owner: Any = cls
    for name in keys[:-1]:
        field = fields_of(owner).get(name)
        inner = bare(field.type) if field else None
        child = node.get(name, field.default if field and inner is Schedule else None)
        if isinstance(child, Schedule):
            child = {part: v for part in fields_of(Schedule) if (v := getattr(child, part)) is not None}
        if not isinstance(child, dict):
            child = {"initial": child} if inner is Schedule else {}
        node[name] = node = child
        owner = inner
    if hint is not Any:
        value = convert(value, hint, key)
        node[keys[-1]] = plain_tree(value) if table_type(hint) else value
    elif value is None:
        node.pop(keys[-1], None)
    else:
        node[keys[-1]] = plain_options(value, key)


def bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def fields_of(hint: Any) -> dict[str, dataclasses.Field[Any]]:
    hint = bare(hint)
    is_table = isinstance(hint, type) and issubclass(hint, Table)
    return {field.name: field for field in dataclasses.fields(hint)} if is_table else {}


def _known(cls: type[Table]) -> Iterator[str]:
    for name, field in fields_of(cls).items():
        yield name
        if inner := (table_type(field.type) or (Schedule if bare(field.type) is Schedule else None)):
            yield from (f"{name}.{rest}" for rest in _known(inner))


def _remedy(cls: type[Table], keys: KeyPath, spell: Callable[[str], str]) -> str:
    """The same name in another table, else the nearest name, else the names in this table."""
    known, key = list(_known(cls)), ".".join(keys)
    last = [name.split(".")[-1] for name in known]
    near = [name for name in known if name.split(".")[-1] == keys[-1] and name.count(".") <= 1][:3]
    near = near or difflib.get_close_matches(key[:120], known, n=1, cutoff=0.75)
    near = near or [known[last.index(n)] for n in difflib.get_close_matches(keys[-1][:120], last, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {' or '.join(map(spell, near))}?"
    inside = [name for name in known if name.rpartition(".")[0] == ".".join(keys[:-1])]
    inside = inside or [name for name in known if "." not in name]
    return f"must be one of {', '.join(map(spell, inside))}"


def dotted(keys: KeyPath) -> str:
    """As TOML would write it: a part that is no bare key is quoted."""
    return ".".join(k if re.fullmatch(r"[\w-]+", k) else json.dumps(k, ensure_ascii=False) for k in keys)
