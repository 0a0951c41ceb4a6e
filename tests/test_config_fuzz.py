"""Round trips of every valid config, and a fuzz of the loader: each input gives a Config or one line of ConfigError."""

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ppo_tbptt.config import Config, ConfigError, describe_fields, parse_overrides

BASE = {"total_steps": 1_000_000, "env": {"id": "Some-v0"}}
MINIMAL = 'total_steps = 1000\nenv.id = "Some-v0"\n'


def base(**changes: Any) -> dict[str, Any]:
    tree = copy.deepcopy(BASE)
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
plain_values = st.recursive(
    st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
decays = st.builds(
    lambda initial, final, power, over: (
        {"initial": initial, "final": final, "power": power} | ({"over_steps": over} if over else {})
    ),
    st.floats(1e-12, 1),
    st.floats(0, 1),
    st.floats(0.01, 100),
    st.none() | st.integers(1, 10**15),
)
schedules = st.floats(1e-12, 1) | decays
valid_trees = st.fixed_dictionaries(
    {
        "total_steps": st.integers(1, 10**15),
        "env": st.fixed_dictionaries(
            {"id": st.just("A-v0")},
            optional={
                "num_envs": st.integers(1, 100),
                "num_workers": st.just("auto") | st.integers(0, 8),
                "max_episode_steps": st.integers(1, 10**9),
                "options": st.dictionaries(texts, plain_values, max_size=4),
            },
        ),
    },
    optional={
        "seed": st.integers(0, 2**31 - 1),
        "core": st.fixed_dictionaries(
            {}, optional={"kind": st.sampled_from(["none", "lstm"]), "num_layers": st.just(2)}
        ),
        "model": st.fixed_dictionaries({"vector_hidden_sizes": st.lists(st.integers(1, 9), min_size=1, max_size=4)}),
        "ppo": st.fixed_dictionaries(
            {},
            optional={
                "sequence_length": st.integers(1, 512),
                "gamma": st.floats(0, 1),
                "clip_range": schedules,
                "learning_rate": schedules,
                "normalize_advantage": st.booleans(),
                "target_kl": st.floats(1e-9, 1e6),
            },
        ),
    },
)


@given(valid_trees)
def test_round_trip(tree: dict[str, Any]) -> None:
    config = Config.from_dict(tree)
    assert Config.from_dict(tomllib.loads(config.to_toml())) == config
    assert Config.from_dict(config.to_dict()) == config
    assert config.env.options == tree["env"].get("options", {})


real_keys = [
    "ppo",
    "env",
    "core",
    "train",
    "model",
    "options",
    "gamma",
    "seed",
    "id",
    "initial",
    "learning_rate",
    "kind",
]
keys = st.sampled_from(real_keys) | st.text(max_size=6)
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
trees = st.recursive(
    anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4),
    max_leaves=12,
)
toml_lines = st.sampled_from(
    [
        *MINIMAL.splitlines(),
        "[ppo]",
        "[env.options]",
        "[[env]]",
        "gamma = 0.5",
        "seed = 1e3",
        "a.b = 3",
        "ppo.gamma = nan",
        "learning_rate = {initial = 1}",
        "x = 2020-01-01T00:00:00Z",
        's = """',
        "'' = 1",
        "seed = 0x10",
        "options = []",
    ]
)
files = st.binary(max_size=60) | st.lists(toml_lines | st.text(max_size=10), max_size=8).map(
    lambda lines: "\n".join(lines).encode("utf-8", "replace")
)
texts_for_keys = st.dictionaries(
    st.sampled_from([row.key for row in describe_fields()]) | st.text(max_size=8),
    st.text(max_size=8) | st.sampled_from(["1e6", "none", "[1, 2]", "{initial = 1}", "true", "-1", "0.5"]) | anything,
    max_size=3,
)


def outcome(function: Any, *args: Any) -> Any:
    """What the function returns, or its ConfigError; anything else fails the test by itself."""
    try:
        return function(*args)
    except ConfigError as error:
        return error


def config_or_one_line(function: Any, *args: Any) -> bool:
    """Whether it is a config."""
    result = outcome(function, *args)
    if isinstance(result, ConfigError):
        assert str(result)
        assert str(result).isprintable(), "one line"
    else:
        assert Config.from_dict(tomllib.loads(result.to_toml())) == result
    return not isinstance(result, ConfigError)


def check_tree(tree: Any) -> None:
    config_or_one_line(Config.from_dict, tree)
    if isinstance(tree, dict):
        config_or_one_line(Config.from_dict, BASE | {key: value for key, value in tree.items() if key != "env"})
        config_or_one_line(Config.from_dict, base(env={"options": tree}))


def check_file(path: Path, content: bytes, overrides: dict[str, Any]) -> None:
    path.write_bytes(content)
    config_or_one_line(Config.load, path, overrides)
    path.write_bytes(MINIMAL.encode() + content)
    config_or_one_line(Config.load, path, overrides)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_fuzz_trees(tree: Any) -> None:
    check_tree(tree)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=files, overrides=texts_for_keys)
def test_fuzz_files(tmp_path: Path, content: bytes, overrides: dict[str, Any]) -> None:
    check_file(tmp_path / "c.toml", content, overrides)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["--seed", "--ppo.gamma=1", "--", "--env", "1", "--a.b"]) | st.text(max_size=8), max_size=4
    )
)
def test_fuzz_command_lines(argv: list[str]) -> None:
    result = outcome(parse_overrides, argv)
    assert isinstance(result, dict) or str(result).isprintable()


SHIPPED = [path.read_bytes() for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))]
pieces = st.sampled_from(
    [b"", b"\0", b"\xff", b"=", b"]", b"[", b'"', b"\n", b"-", b"9" * 5000, b"1e400", b"nan", b"[" * 5000, b"a." * 5000]
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A shipped config with up to three of its parts cut out, doubled, moved or replaced."""
    text = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        piece = draw(pieces | st.binary(max_size=4) | st.just(text[start:end] * 2) | st.sampled_from(text.split(b"\n")))
        text = text[:start] + piece + text[end:]
    return text


def load_mutants(folder: Path, number: int) -> list[bool]:
    """Whether each of so many mutants was a valid config."""
    valid: list[bool] = []

    @settings(max_examples=number, deadline=None)
    @given(mutated())
    def run(content: bytes) -> None:
        path = folder / "c.toml"
        path.write_bytes(content)
        valid.append(config_or_one_line(Config.load, path))

    run()
    return valid


def test_mutated_configs(tmp_path: Path) -> None:
    valid = load_mutants(tmp_path, 100)
    assert any(valid) and not all(valid)


@pytest.mark.slow
def test_many_mutated_configs(tmp_path: Path) -> None:
    valid = load_mutants(tmp_path, 2000)
    assert len(valid) >= 2000
    assert 100 < sum(valid) < len(valid) - 100


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees, content=files, overrides=texts_for_keys)
def test_fuzz_long(tmp_path: Path, tree: Any, content: bytes, overrides: dict[str, Any]) -> None:
    check_tree(tree)
    check_file(tmp_path / "c.toml", content, overrides)
