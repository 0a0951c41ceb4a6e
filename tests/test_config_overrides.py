"""Overrides: what a command line may say, what it changes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
from configs_for_tests import error_of, write

from ppo_tbptt.commands.parser import split_overrides
from ppo_tbptt.config import Config, EnvConfig, Schedule, UserCoreConfig


def user_core(**options: Any) -> UserCoreConfig:
    return UserCoreConfig.model_validate({"kind": "m:C", **options})


FILE = """total_steps = 1000
[env]
id = "Some-v0"
options = { a = 1, command_count = [10] }
[ppo]
sequence_length = 16
learning_rate = { initial = 1e-3, final = 1e-4, over_steps = 500 }
entropy_coef = 0.5
"""
RATE = "ppo.learning_rate"


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        (["--seed", "3"], "seed", 3),
        (["--total-steps", "1e6"], "total_steps", 1_000_000),
        (["--ppo.gamma", "1"], "ppo.gamma", 1.0),
        (["--core.kind", "none"], "core.kind", "none"),
        (["--core.kind", '"rnn_tanh"'], "core.kind", "rnn_tanh"),
        (["--env.id", "5"], "env.id", "5"),
        (["--ppo.sequence-length", "none"], "ppo.sequence_length", None),
        (["--ppo.normalize-advantage", "True"], "ppo.normalize_advantage", True),
        (["--model.cnn-channels", "[1, 2, 3]"], "model.cnn_channels", (1, 2, 3)),
        (["--ppo.learning-rate", "1e-4"], RATE, Schedule(initial=1e-4)),
        (["--ppo.learning-rate.initial", "1"], RATE, Schedule(initial=1.0, final=1e-4, over_steps=500)),
        (["--ppo.learning-rate.over-steps", "none"], RATE, Schedule(initial=1e-3, final=1e-4)),
        (["--ppo.learning-rate", ".1", "--ppo.learning-rate.final", "0"], RATE, Schedule(initial=0.1, final=0.0)),
        (["--ppo.entropy-coef.final", "0.1"], "ppo.entropy_coef", Schedule(initial=0.5, final=0.1)),
        (["--ppo.clip-range.final", "0.05"], "ppo.clip_range", Schedule(initial=0.1, final=0.05)),  # a default
        (["--env.options.command-count", "[2]"], "env.options", {"a": 1, "command_count": [2]}),
        (["--env.options.command-count=none"], "env.options", {"a": 1}),
        (["--env.options.b.c", "-1.5"], "env.options", {"a": 1, "command_count": [10], "b": {"c": -1.5}}),
        (["--env.options", "{command_count = [2]}"], "env.options", {"command_count": [2]}),
        (["--losses.my_pkg.aux:recon", "1"], "losses", {"my_pkg.aux:recon": 1.0}),
        (["--losses.a", "1", "--losses.b", "none"], "losses", {"a": 1.0}),
        (["--core.width", "3", "--core.kind", "m:C"], "core", user_core(width=3)),
        (["--core.kind=m:C", "--core.net.a-b", "x"], "core", user_core(net={"a_b": "x"})),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_overrides(tmp_path: Path, argv: list[str], key: str, value: Any) -> None:
    path = write(tmp_path, FILE)
    plain, changed = Config.load(path), Config.load(path, split_overrides(argv, {})[1])
    found: Any = changed
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)
    head = key.split(".")[0]  # and nothing else
    for name in Config.model_fields:
        if name != head:
            assert getattr(changed, name) == getattr(plain, name)


def test_overrides_as_python_values_and_for_what_the_file_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 4")
    changes = {"total_steps": 10, "env.id": "A-v0", "ppo.clip_range": Schedule(initial=0.2), "env.options.a": [1, {}]}
    config = Config.load(path, changes)
    assert (config.seed, config.total_steps, config.ppo.clip_range.initial) == (4, 10, 0.2)
    assert config.env == EnvConfig(id="A-v0", options={"a": [1, {}]})


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--ppo.lerning-rate", "1"], ["--ppo.lerning-rate: ", "value 1;", "did you mean ppo.learning_rate?"]),
        (["--ppo.learning-rate.inital=1"], ["--ppo.learning-rate.inital: ", "did you mean ppo.learning_rate.initial?"]),
        (["--env.options.", "1"], ["--env.options.: not a key", "--key value"]),
        (["--ppo", "1"], ["--ppo: 1 is not allowed", "a table {rollout_steps, "]),
        (["--seed"], ["--seed: has no value", "a whole number"]),
        (["--seed", "1", "--seed", "2"], ["--seed: given twice", '"2"']),
        (["--seed", "1.5"], ["--seed: 1.5", "a whole number"]),
        (["--seed="], ['--seed: ""', "a whole number"]),
        (["--seed", "1\ndevice = 3"], ["--seed: ", "a whole number"]),
        (["--total-steps", "1e400"], ["--total-steps: inf", "a whole number"]),
        (["--ppo.gamma", "none"], ["--ppo.gamma: none", "a number from 0 to 1"]),
        (["--model.cnn-channels", "[1, 2"], ['--model.cnn-channels: "[1, 2"', "not valid TOML"]),
        (["--ppo.learning-rate", "{final = 1}"], ["--ppo.learning-rate: missing", "number"]),
        (["--ppo.learning-rate.final", "none"], ["--ppo.learning-rate.final: 500 has no effect without final", "drop"]),
        (["--core.hiden-size", "3"], ["--core.hiden-size: unknown", "3", "did you mean core.hidden_size?"]),
        (["--env.num-seeds", "300000"], ["--env.num-seeds: ", "0..299999", "must not overlap"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_overrides(tmp_path: Path, argv: list[str], words: list[str]) -> None:
    path = write(tmp_path, FILE)
    message = error_of(lambda: Config.load(path, split_overrides(argv, {})[1]))
    assert message.startswith(f"command line: {words[0]}"), message
    for word in words:
        assert word in message


def test_errors_of_the_file_stay_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, FILE + "gamma = 7")
    assert error_of(Config.load, path, {"seed": "3"}).startswith(f"{path}: ppo.gamma: 7")
    path = write(tmp_path, "train = 3\n" + FILE)
    assert error_of(Config.load, path, {"train.eval_every": "2"}).startswith(f"{path}: train: 3 is not allowed")
    message = error_of(Config.load, write(tmp_path, FILE), {"ppo.gamma": 3})
    assert message.startswith("override: ppo.gamma: 3")
