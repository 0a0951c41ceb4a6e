"""Loops around a Policy as the README shows them, on Gymnasium's own environments."""

import contextlib
import gc
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny

from ppo_tbptt import Policy
from ppo_tbptt.training.trainer import Trainer


@pytest.fixture(autouse=True)
def nothing_is_left_to_close() -> Iterator[None]:
    """Gymnasium's vectors close what they hold when they are collected, and MemoryGym's close ends pygame for all."""
    yield
    gc.collect()


README = Path(__file__).parent.parent / "README.md"


def block(name: str) -> str:
    """The README's block after the comment ``<!-- tested: NAME -->``."""
    found = re.search(rf"<!-- tested: {name} -->\n+```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loops")
    config = tiny(
        total_steps=32,
        env={"id": "MortarMayhem-Grid-v0", "num_envs": 2, "options": {"command_count": [1]}},
        model={"cnn_channels": [4, 4, 4]},
    )
    with Trainer(config, path / "runs" / "quickstart") as trainer:
        list(trainer)
    return path


def execute(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    assert out.getvalue()
    return names


def test_one_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = execute(block("one environment"), folder, monkeypatch)
    assert names["done"]
    assert names["info"]["length"] == 10  # of a single command: the options reached the environment


def test_a_vector_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten episodes of ten steps each: all environments have just begun anew, with options and without memory."""
    names = execute(block("a vector environment"), folder, monkeypatch)
    assert names["terminated"].all()
    policy, fresh, obs = names["policy"], Policy.load(folder / "runs" / "quickstart"), names["obs"]
    policy.act(obs)
    fresh.act(obs)
    torch.testing.assert_close(policy.value, fresh.value, rtol=0, atol=0)
