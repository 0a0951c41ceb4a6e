"""Checkpoints are written whole or not at all, and reading one executes nothing."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_tbptt.run import checkpoint
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

TREE = {"config": {"a": 1}, "agent": {"w": torch.ones(3)}, "best": None}


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)
    tree = load_checkpoint(tmp_path / "c.pt")
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
    torch.save({**TREE, "bad": Malicious(target)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Malicious(target)))
    save_checkpoint(tmp_path / "checksum.pt", {**TREE, "bad": Malicious(target)})
    for name in ("zip.pt", "raw.pt", "checksum.pt"):
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


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        save_checkpoint(tmp_path / "c.pt", TREE)
    with pytest.raises(CheckpointError, match="format 99; this version reads format 2"):
        load_checkpoint(tmp_path / "c.pt")
    save_checkpoint(tmp_path / "other.pt", {"weights": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no config and agent"):
        load_checkpoint(tmp_path / "other.pt")


def test_torch_reads_it_by_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)
    assert torch.load(tmp_path / "c.pt", weights_only=True)["config"] == TREE["config"]


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, TREE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint|format"):
            load_checkpoint(path)
    for size in range(0, len(whole), 101):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


def test_a_limit_on_the_size_of_files_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    """What torch's writer makes of a disk that fills up is an OSError again."""

    class Full:
        def __init__(self) -> None:
            self.left = 500

        def write(self, data: bytes) -> int:
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return len(data)

    def full_disk(file: Any) -> Any:
        return type("Half", (), {"write": Full().write, "flush": lambda self: None})()

    save_checkpoint(tmp_path / "c.pt", TREE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_HashingFile", full_disk)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tmp_path / "c.pt", {**TREE, "best": 2.0})
    assert load_checkpoint(tmp_path / "c.pt")["best"] is None
