"""Checkpoints are written whole or not at all, and reading one executes nothing."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_tbptt import checkpoint
from ppo_tbptt.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

TREE = {"config": {"a": 1}, "agent": {"w": torch.ones(3)}, "best": None}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)
    tree = load_checkpoint(tmp_path / "c.pt")
    assert tree["format"] == checkpoint.FORMAT
    assert torch.equal(tree["agent"]["w"], torch.ones(3))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)

    def full(tree: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c.pt", {**TREE, "best": 1.0})
    assert load_checkpoint(tmp_path / "c.pt")["best"] is None
    assert os.listdir(tmp_path) == ["c.pt"]


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    target = tmp_path / "was_here"
    torch.save({**TREE, "format": 1, "bad": Malicious(target)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(target)))
    for name in ("zip.pt", "raw.pt"):
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, None])
def test_no_checkpoint(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_format_is_refused(tmp_path: Path) -> None:
    torch.save({**TREE, "format": 99}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        load_checkpoint(tmp_path / "c.pt")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="no format, config and agent"):
        load_checkpoint(tmp_path / "other.pt")
