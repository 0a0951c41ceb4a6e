"""Round trips of every valid config, and a fuzz of the loader: each input gives a Config or one line of error."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from configs_for_tests import BASE, MINIMAL, base
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_tbptt.commands.parser import UsageError, split_overrides
from ppo_tbptt.config import Config, ConfigError, describe_fields

numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=8)
plain_values = st.recursive(
    st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
decays = st.fixed_dictionaries(
    {"initial": st.floats(1e-12, 1), "final": st.floats(0, 1), "power": st.floats(0.01, 100)},
    optional={"over_steps": st.integers(1, 10**15)},
)
schedules = st.floats(1e-12, 1) | decays
valid_trees = st.fixed_dictionaries(
    {
        "total_steps": st.integers(1, 10**15),
        "env": st.fixed_dictionaries(
            {"id": st.just("A-v0")},
            optional={
                "num_workers": st.just("auto") | st.integers(0, 8),
                "options": st.dictionaries(texts, plain_values, max_size=4),
            },
        ),
    },
    optional={
        "core": st.fixed_dictionaries({"kind": st.sampled_from(["none", "lstm"]), "num_layers": st.just(2)}),
        "model": st.fixed_dictionaries({"vector_hidden_sizes": st.lists(st.integers(1, 9), max_size=4)}),
        "ppo": st.fixed_dictionaries(
            {},
            optional={
                "sequence_length": st.integers(1, 512),
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


names = ["ppo", "env", "core", "train", "options", "gamma", "seed", "id", "initial", "learning_rate", "kind"]
keys = st.sampled_from(names) | st.text(max_size=6)
anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.binary(max_size=4)
trees = st.recursive(
    anything,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(), inner, max_size=4),
    max_leaves=12,
)
toml_lines = st.sampled_from(
    f"""{MINIMAL}[ppo]
[env.options]
[[env]]
gamma = 0.5
seed = 1e3
a.b = 3
ppo.gamma = nan
learning_rate = {{initial = 1}}
x = 2020-01-01T00:00:00Z
s = \"\"\"
'' = 1
seed = 0x10
options = []""".splitlines()
)
files = st.binary(max_size=60) | st.lists(toml_lines | st.text(max_size=10), max_size=8).map(
    lambda lines: "\n".join(lines).encode("utf-8", "replace")
)
texts_for_keys = st.dictionaries(
    st.sampled_from([row.key for row in describe_fields()]) | st.text(max_size=8),
    st.text(max_size=8) | st.sampled_from(["1e6", "none", "[1, 2]", "{initial = 1}", "true", "-1", "0.5"]) | anything,
    max_size=3,
)


def check(function: Any, *args: Any) -> None:
    """A config that survives the round trip, other values, or one line of error."""
    try:
        result = function(*args)
    except (ConfigError, UsageError) as error:
        result = error
    if isinstance(result, Config):
        assert Config.from_dict(tomllib.loads(result.to_toml())) == result
    else:
        assert isinstance(result, tuple) or str(result).isprintable(), "one line"


tokens = st.sampled_from(["--seed", "--ppo.gamma=1", "--", "--env", "1", "--a.b"]) | st.text(max_size=8)


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_trees_files_and_overrides(examples: int, tmp_path: Path) -> None:
    @settings(max_examples=examples)
    @given(tree=trees, content=files, overrides=texts_for_keys, argv=st.lists(tokens, max_size=4))
    def run(tree: Any, content: bytes, overrides: dict[str, Any], argv: list[str]) -> None:
        check(Config.from_dict, tree)
        if isinstance(tree, dict):
            check(Config.from_dict, BASE | {key: value for key, value in tree.items() if key != "env"})
            check(Config.from_dict, base(env={"options": tree}))
        path = tmp_path / "c.toml"
        for text in (content, MINIMAL.encode() + content):
            path.write_bytes(text)
            check(Config.load, path, overrides)
        check(split_overrides, argv, {})

    run()
