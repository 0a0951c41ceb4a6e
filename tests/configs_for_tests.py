"""Configs that train in a second, and what the tests of configs share."""

import copy
from pathlib import Path
from typing import Any

import pytest

from ppo_tbptt.commands.parser import UsageError
from ppo_tbptt.config import Config, ConfigError

TINY: dict[str, Any] = {
    "total_steps": 256,
    "device": "cpu",
    "env": {"id": "ppo_tbptt/PocMemory-v0", "num_envs": 4, "num_workers": 0},
    "model": {"hidden_size": 16, "vector_hidden_sizes": [16]},
    "core": {"kind": "gru", "hidden_size": 8},
    "ppo": {"rollout_steps": 16, "sequence_length": 8, "num_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-3},
    "train": {"checkpoint_every": 2, "eval_num_seeds": 4, "eval_repeats": 2, "keep_checkpoints": 2, "video_every": 0},
}


def tiny(**changes: Any) -> Config:
    return Config.from_dict(TINY).replace(**changes)


BASE: dict[str, Any] = {"total_steps": 1_000_000, "env": {"id": "Some-v0"}}
MINIMAL = 'total_steps = 1000\nenv.id = "Some-v0"\n'


def base(**changes: Any) -> dict[str, Any]:
    """A valid tree with ``changes``, merged into its tables."""
    tree = copy.deepcopy(BASE)
    for key, value in changes.items():
        tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
    return tree


def write(folder: Path, content: str | bytes, name: str = "c.toml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(function: Any, *args: Any, **kwargs: Any) -> str:
    """The one line of an error in a config or a command line."""
    with pytest.raises((ConfigError, UsageError)) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600
    return message
