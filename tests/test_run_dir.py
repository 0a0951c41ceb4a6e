"""Which checkpoint a run's folder stands for, and that only one process writes there."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppo_tbptt.run.checkpoint import CheckpointError, save_checkpoint
from ppo_tbptt.run.folder import RunDir, RunDirError, RunLock


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(tmp_path / "run")
    run.config.write_text("")
    for iteration in (2, 4, 6):
        save_checkpoint(run.checkpoint(iteration), {"config": {}, "agent": {"w": torch.full((100,), float(iteration))}})
    return run


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    contents = {"cut": whole[:-200], "empty": b"", "flipped": whole[:300] + bytes([whole[300] ^ 4]) + whole[301:]}
    path.write_bytes(contents[how])


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(run: RunDir, how: str) -> None:
    damage(run.checkpoint(6), how)
    with pytest.warns(UserWarning, match=r"iteration_0000006\.pt.*iteration_0000004\.pt is used instead"):
        path, tree = run.load_newest()
    assert path == run.checkpoint(4)
    assert tree["agent"]["w"][0] == 4


def test_the_newest_is_summed_once(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of large agents have hundreds of megabytes."""
    digests: list[object] = []
    monkeypatch.setattr("hashlib.sha256", lambda make=hashlib.sha256: digests.append(made := make()) or made)
    assert run.load_newest()[1]["agent"]["w"][0] == 6
    assert len(digests) == 1


def test_none_left_is_one_error(run: RunDir) -> None:
    for iteration in (2, 4, 6):
        damage(run.checkpoint(iteration), "cut")
    with pytest.raises(CheckpointError, match="none of its 3 checkpoints") as caught:
        run.newest()
    assert "\n" not in str(caught.value)
    save_checkpoint(run.best, {"config": {}, "agent": {}})
    with pytest.warns(UserWarning, match="best.pt is used instead"):
        assert run.newest() == run.best


def test_only_one_process_writes_and_a_killed_one_does_not_block(run: RunDir) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ppo_tbptt.run.folder import RunLock\n"
        "lock = RunLock(Path(sys.argv[1])); print('has it', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunDirError, match=rf"another training \(process {other.pid}\)"):
            RunLock(run.path)
        other.kill()
    RunLock(run.path).release()
    RunLock(run.path).release()


def test_leftovers_of_a_killed_process_go(run: RunDir) -> None:
    leftover = run.checkpoints / ".iteration_0000008.pt.4711.tmp"
    leftover.write_bytes(b"half")
    run.remove_temporary_files()
    assert not leftover.exists()
    assert len(run.periodic()) == 3
