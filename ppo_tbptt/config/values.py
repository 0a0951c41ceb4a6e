"""What one configuration value may be: types with bounds, checked and described in words. Knows no setting by name."""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

MAX_OPTION_DEPTH = 8
_REJECTED: Any = object()
T = TypeVar("T", bound="Table")


class ConfigError(ValueError):
    """Wrong input from a person, always one printable line: `<source>: <key>: <value and what is wrong>; <remedy>`."""

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in message)
        super().__init__("".join(printable))


class Problem(ConfigError):
    """A wrong value, found where its source is not known; `keys[0]` is blamed unless another of them was typed."""

    def __init__(self, keys: tuple[str, ...], text: str, source: str = "config") -> None:
        super().__init__(f"{source}: {shorten(keys[0])}: {text}")
        self.keys, self.text = keys, text

    def under(self, prefix: str) -> "Problem":
        return Problem(tuple(f"{prefix}.{key}" for key in self.keys), self.text)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """Closed interval for a number (or for a list's length); `above`/`below` exclude the ends."""

    low: int | float = -1e300
    high: int | float = 1e300
    above: bool = False
    below: bool = False

    def hold(self, number: int | float) -> bool:
        """False for NaN and the infinities too, since no comparison with them succeeds."""
        over = self.low < number if self.above else self.low <= number
        return over and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low, high = (f"{int(end):_}" if end == int(end) else str(end) for end in (self.low, self.high))
        return f"{'above' if self.above else 'from'} {low} {'up to but not including' if self.below else 'to'} {high}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A checked table of settings: every field is converted and bounded on construction, then `check` sees all."""

    def __post_init__(self) -> None:
        try:
            for field in dataclasses.fields(self):
                object.__setattr__(self, field.name, convert(getattr(self, field.name), field.type, field.name))
            self.check()
        except Problem as problem:
            raise Problem(problem.keys, problem.text, source=f"{type(self).__name__}()") from None

    def check(self) -> None:
        """Raise `Problem` for combinations that cannot work together."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(Table):
    """Polynomial decay over environment steps; constant without `final`."""

    initial: Annotated[float, Bounds(0, 1e9)]
    """Value at the first step."""
    final: Annotated[float, Bounds(0, 1e9)] | None = None
    """Value from `over_steps` on; none: constant at `initial`."""
    power: Annotated[float, Bounds(0, 100, above=True)] = 1.0
    """Exponent of the decay; 1 is a straight line."""
    over_steps: Annotated[int, Bounds(1, 10**15)] | None = None
    """Environment steps until `final` is reached; none: `total_steps`."""

    def check(self) -> None:
        for name, default in (("over_steps", None), ("power", 1.0)):
            value = getattr(self, name)
            if self.final is None and value != default:
                raise Problem((name, "final"), f"{value} has no effect without final; set final or drop {name}")

    def at(self, env_steps: int, total_steps: int) -> float:
        """`final + (initial - final) * (1 - min(env_steps / over_steps, 1)) ** power`; `final` exactly from there on.

        `env_steps` were done before; `total_steps` is the span of a schedule without one of its own.
        """
        if self.final is None:
            return self.initial
        remaining = 1.0 - min(env_steps / (self.over_steps or total_steps), 1.0)
        return self.final + (self.initial - self.final) * remaining**self.power


def convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as `hint` wants it: int to float, list to tuple, number or table to `Schedule`; options are copied."""
    found = _accept(value, hint, Bounds(), key)
    if found is _REJECTED:
        raise Problem((key,), f"{shown(value)} is not allowed; must be {describe(hint)}")
    return found


def _accept(value: Any, hint: Any, bounds: Bounds, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _accept(value, args[0], args[1], key)
    if origin in (Union, types.UnionType):
        return next((v for v in (_accept(value, a, bounds, key) for a in args) if v is not _REJECTED), _REJECTED)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else _REJECTED
    if hint is dict or origin is dict:
        return plain_options(value, key) if isinstance(value, dict) else _REJECTED
    if origin is tuple:
        return _accept_tuple(value, args, bounds, key)
    if isinstance(hint, type) and issubclass(hint, Schedule):
        return _accept_schedule(value, bounds, key)
    if hint in (int, float):
        kinds = int if hint is int else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and bounds.hold(value)
        return hint(value) if fits else _REJECTED
    if hint is str:
        return str(value) if isinstance(value, str) and _encodable(value) else _REJECTED
    if hint is type(None) and value == "none":
        return None
    return value if isinstance(value, hint) else _REJECTED  # bool, None and whole tables


def _accept_tuple(value: Any, args: tuple[Any, ...], bounds: Bounds, key: str) -> Any:
    if not isinstance(value, list | tuple):
        return _REJECTED
    any_length = args[-1] is Ellipsis
    if not bounds.hold(len(value)) if any_length else len(value) != len(args):
        return _REJECTED
    items = tuple(_accept(v, args[0] if any_length else args[i], Bounds(), key) for i, v in enumerate(value))
    return _REJECTED if any(item is _REJECTED for item in items) else items


def _accept_schedule(value: Any, bounds: Bounds, key: str) -> Any:
    try:
        if isinstance(value, dict):
            value = construct(Schedule, value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and bounds.hold(value):
            value = Schedule(initial=float(value))
    except Problem as problem:
        raise problem.under(key) from None
    if not isinstance(value, Schedule):
        return _REJECTED
    for name, part in (("initial", value.initial), ("final", value.final)):
        if part is not None and not bounds.hold(part):
            raise Problem((f"{key}.{name}",), f"{part} is not allowed; must be a number {bounds}")
    return value


def construct(cls: type[T], tree: Mapping[Any, Any]) -> T:
    """Build `cls` and the tables in it from a plain tree; what the tree leaves out takes its default."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in tree.items():
        if name not in fields:
            raise Problem((str(name),), f"unknown, with value {shown(value)}; {closest(name, fields)}")
    values = {}
    for name, field in fields.items():
        inner = table_type(field.type)
        try:
            if inner and isinstance(tree.get(name, {}), Mapping):
                values[name] = construct(inner, tree.get(name, {}))
            elif name in tree:
                values[name] = convert(tree[name], field.type, name)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise Problem((name,), f"missing; must be {describe(field.type)}")
        except Problem as problem:
            raise problem.under(name) if inner else problem from None
    return cls(**values)


def table_type(hint: Any) -> type[Table] | None:
    """The class of a `[table]`; a schedule is a value, though it can be written as a table."""
    return hint if isinstance(hint, type) and issubclass(hint, Table) and hint is not Schedule else None


def plain_options(value: Any, key: str, depth: int = 1) -> Any:
    """A deep copy of what TOML, JSON and a checkpoint can all hold: text, numbers, booleans, lists, tables."""
    if isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and _encodable(value):
        return str(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if depth <= MAX_OPTION_DEPTH and isinstance(value, list | tuple):
        return [plain_options(item, key, depth + 1) for item in value]
    if depth <= MAX_OPTION_DEPTH and isinstance(value, Mapping) and all(map(_encodable, value)):
        return {str(k): plain_options(v, f"{key}.{k}", depth + 1) for k, v in value.items()}
    legal = "text, finite numbers of at most 64 bits, true, false, and lists and tables of these"
    text = f"{shown(value)} is not allowed; must be made of {legal}, nested at most {MAX_OPTION_DEPTH} deep"
    raise Problem((key,), text)


def plain_tree(value: Any) -> Any:
    """The inverse of `construct`: nested dicts and lists; a constant schedule becomes its number.

    None is left out where it is the default, and "none" where it is not, as TOML has no such value.
    """
    if isinstance(value, Schedule) and value.final is None:
        return value.initial
    if isinstance(value, Table):
        parts = {field: getattr(value, field.name) for field in dataclasses.fields(value)}
        written = {field: part for field, part in parts.items() if part is not None or field.default is not None}
        return {field.name: "none" if part is None else plain_tree(part) for field, part in written.items()}
    return plain_options(value, "") if isinstance(value, dict | list | tuple) else value


def describe(hint: Any, bounds: Bounds | None = None) -> str:
    """What a field accepts, in words: `a whole number from 1 to 65536, or none`."""
    origin, args = get_origin(hint), get_args(hint)
    span = f" {bounds}" if bounds else ""
    if origin is Annotated:
        return describe(args[0], args[1])
    if origin in (Union, types.UnionType):
        return ", or ".join(describe(a, bounds) for a in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(f'"{a}"' for a in args)
    if origin is tuple:
        number = f"of {bounds.low} to {bounds.high}, each" if bounds else f"of {len(args)}, each"
        return f"a list {number} {describe(args[0])}"
    if isinstance(hint, type) and issubclass(hint, Schedule):
        parts = ", ".join(field.name for field in dataclasses.fields(hint))
        return f"a number{span}, or a table {{{parts}}}"
    if table_type(hint) or hint is dict or origin is dict:
        return "a table"
    names = {int: f"a whole number{span}", float: f"a number{span}", str: "text", bool: "true or false"}
    return names.get(hint, "none")


def shown(value: Any) -> str:
    """A value in an error message, as one would write it in TOML, and never long."""
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


def closest(name: Any, known: Iterable[str]) -> str:
    """The remedy for an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(str(name)[:80], known, n=1)
    return f"did you mean {near[0]}?" if near else f"must be one of {', '.join(known)}"


def shorten(text: str, limit: int = 90) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _encodable(text: Any) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)
