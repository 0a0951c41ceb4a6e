"""Loops around a Policy as the README shows them, on Gymnasium's own environments."""

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_tiny

from ppo_tbptt import Policy

README = Path(__file__).parent.parent / "README.md"
Execute = Callable[[str], dict[str, Any]]


@pytest.fixture(autouse=True)
def nothing_is_left_to_close() -> Iterator[None]:
    """Gymnasium's vectors close what they hold when they are collected, and MemoryGym's close ends pygame for all."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loops")
    env = {"id": "MortarMayhem-Grid-v0", "num_envs": 2, "options": {"command_count": [1]}}
    train_tiny(path / "runs" / "quickstart", total_steps=32, env=env, model={"cnn_channels": [4, 4, 4]})
    return path


@pytest.fixture
def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Execute:
    """Run the README's block after the comment ``<!-- tested: NAME -->``. Returns its variables."""

    def run_it(name: str) -> dict[str, Any]:
        pattern = rf"<!-- tested: {name} -->\n+```python\n(.*?)```"
        found = re.search(pattern, README.read_text(encoding="utf-8"), re.DOTALL)
        assert found is not None
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(found[1], names)
        assert capsys.readouterr().out
        return names

    return run_it


def test_one_environment(execute: Execute) -> None:
    names = execute("one environment")
    assert names["done"]
    assert names["info"]["length"] == 10  # of a single command: the options reached the environment


def test_a_vector_environment(execute: Execute, folder: Path) -> None:
    """Ten episodes of ten steps each: all environments have just begun anew, with options and without memory."""
    names = execute("a vector environment")
    assert names["terminated"].all()
    policy, fresh, obs = names["policy"], Policy.load(folder / "runs" / "quickstart"), names["obs"]
    policy.act(obs)
    fresh.act(obs)
    torch.testing.assert_close(policy.value, fresh.value, rtol=0, atol=0)
