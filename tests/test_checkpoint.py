"""Checkpoints are written whole or not at all, what is damaged is noticed, and a run's folder knows its newest."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from ppo_tbptt.run import checkpoint
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_tbptt.run.folder import RunDir

TREE = {"config": {"a": 1}, "agent": {"w": torch.ones(3)}, "best": None}


def test_round_trip_also_through_torch_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)
    for tree in (load_checkpoint(tmp_path / "c.pt"), torch.load(tmp_path / "c.pt", weights_only=True)):
        assert torch.equal(tree["agent"]["w"], torch.ones(3))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        save_checkpoint(tmp_path / "c.pt", TREE)
    with pytest.raises(CheckpointError, match="format 99; this version reads format 2"):
        load_checkpoint(tmp_path / "c.pt")
    save_checkpoint(tmp_path / "other.pt", {"weights": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no config and agent"):
        load_checkpoint(tmp_path / "other.pt")


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


@pytest.mark.parametrize("of_torch", [False, True])
def test_a_failed_write_leaves_the_old_file(of_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's writer makes a RuntimeError of it."""

    def full(tree: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            if of_torch:
                raise RuntimeError("PytorchStreamWriter failed writing file") from None
            raise

    save_checkpoint(tmp_path / "c.pt", TREE)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c.pt", {**TREE, "best": 1.0})
    assert load_checkpoint(tmp_path / "c.pt")["best"] is None
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_finds_its_newest_and_sums_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of large agents have hundreds of megabytes."""
    run = RunDir.create(tmp_path / "run")
    for iteration in (2, 4):
        save_checkpoint(run.checkpoint(iteration), {**TREE, "iteration": iteration})
    (run.checkpoints / ".iteration_0000006.pt.4711.tmp").write_bytes(b"half")
    run.remove_temporary_files()
    assert sorted(run.checkpoints.iterdir()) == run.periodic() == [run.checkpoint(2), run.checkpoint(4)]
    digests: list[object] = []
    monkeypatch.setattr("hashlib.sha256", lambda make=hashlib.sha256: digests.append(made := make()) or made)
    path, tree = run.load_newest()
    assert (path, tree["iteration"], len(digests)) == (run.checkpoint(4), 4, 1)
    for path in run.periodic():
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints") as caught:
        run.newest()
    assert "\n" not in str(caught.value)
    save_checkpoint(run.best, TREE)
    with pytest.warns(UserWarning, match="best.pt is used instead"):
        assert run.newest() == run.best
