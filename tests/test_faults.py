"""What happens to a run when a process, the disk, the arithmetic or a worker fails: row by row as in the README."""

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from helpers import poison
from test_resume import assert_same, results

from ppo_tbptt.cli import main
from ppo_tbptt.envs import VectorEnv, WorkerError
from ppo_tbptt.evaluation import evaluate as evaluation
from ppo_tbptt.ppo.advantages import compute_targets
from ppo_tbptt.ppo.learner import NonFiniteError
from ppo_tbptt.run import sinks
from ppo_tbptt.run.checkpoint import load_checkpoint, save_checkpoint
from ppo_tbptt.run.folder import RunDir, RunDirError
from ppo_tbptt.run.metrics import Report, read_metrics
from ppo_tbptt.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
FAULTY: dict[str, Any] = {"id": "fixture_envs:fixture/Faulty-v0", "options": {"step_at": 5}}  # of every episode


def finish(trainer: Trainer) -> list[Report]:
    reports = list(trainer)
    assert all(p.isfinite().all() for p in trainer.agent.parameters())
    return reports


# --- the trainer is killed ------------------------------------------------------------------------------------------

KILLED = tiny(
    total_steps=64 * 40,
    env={"num_workers": 1},
    core={"hidden_size": 128},
    train={"checkpoint_every": 1, "eval_every": 10, "keep_checkpoints": 2},
)


def start(config: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(config), "--run-dir", str(run), "--continue"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_of_the_trainer_at_random_moments(kills: int, tmp_path: Path) -> None:
    """Kill a run again and again until it is finished; it must then equal one that was left alone.

    The checkpoints are large and frequent for the task's size, so that many kills hit the writing of one. A run that
    finishes before all kills are done is repeated.
    """
    moments = random.Random(0)
    path = tmp_path / "config.toml"
    path.write_text(KILLED.to_toml())
    with Trainer(KILLED, tmp_path / "whole") as trainer:
        list(trainer)
    done = number = 0
    while done < kills:
        run = tmp_path / f"run_{number}"
        number += 1
        while True:
            process = start(path, run)
            began = RunDir(run).periodic()
            while done < kills and process.poll() is None and RunDir(run).periodic() == began:
                time.sleep(0.01)  # to be killed where it works, not while it imports torch
            try:
                _, error = process.communicate(timeout=moments.uniform(0, 0.5) if done < kills else 100)
                assert process.returncode == 0, error.decode()
                break
            except subprocess.TimeoutExpired:
                process.kill()
                _, error = process.communicate()
                assert not error.decode().strip(), error.decode()
                done += 1
        assert_same(results(tmp_path / "whole"), results(run))
        assert not list(run.rglob(".*.tmp"))


# --- workers --------------------------------------------------------------------------------------------------------


HOW = {signal.SIGKILL: "SIGKILL", signal.SIGSTOP: "did not answer within 1 s"}


@pytest.mark.parametrize("number", HOW)
def test_a_worker_that_is_killed_or_hangs(number: signal.Signals, tmp_path: Path) -> None:
    with Trainer(tiny(env={"num_workers": 2, "step_timeout": 1.0}), tmp_path / "run") as trainer:
        next(trainer)
        assert isinstance(trainer.envs, VectorEnv)
        os.kill(trainer.envs.worker_pids[1], number)
        report = next(trainer)
        assert len(report.notes) == 1 and HOW[number] in report.notes[0]
        finish(trainer)
    assert [row["faults/worker_restarts"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1, 1]


def test_after_max_worker_restarts_the_run_stops_with_the_last_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(env={**FAULTY, "num_workers": 1, "max_worker_restarts": 2})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert main(["train", str(path), "--run-dir", str(tmp_path / "cli")]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "2 restarts" in error


def test_what_failed_is_counted_over_the_whole_run(tmp_path: Path) -> None:
    """Every fifth step of each of four environments fails, and costs that step alone: 3, 6, 9, 12 times in 64 steps."""
    config = tiny(env={**FAULTY, "max_worker_restarts": 99}, train={"checkpoint_every": 1})
    with Trainer(config, tmp_path / "run") as trainer:
        reports = [next(trainer), next(trainer)]
    with Trainer.resume(tmp_path / "run") as trainer:
        reports += finish(trainer)
    assert [report.scalars["faults/worker_restarts"] for report in reports] == [12, 24, 36, 48]
    assert [report.scalars["faults/cut_episodes"] for report in reports] == [12, 24, 36, 48]


@pytest.mark.parametrize("failures", [2, 3])
def test_an_evaluation_is_done_again_while_restarts_are_left(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [failures]

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise WorkerError("worker 3 is gone\nand more")
        return evaluation.evaluate(*args, **kwargs)

    monkeypatch.setattr("ppo_tbptt.training.callbacks.evaluate", evaluate)
    config = tiny(env={"max_worker_restarts": 2}, train={"eval_every": 1})
    with Trainer(config, tmp_path / "run") as trainer:
        if failures > 2:
            with pytest.raises(WorkerError, match="worker 3 is gone"):
                next(trainer)
            return
        report = next(trainer)
        again = "worker 3 is gone; the evaluation is done again ({} of at most 2)\nand more"
        assert report.notes == (again.format(1), again.format(2))
        assert "eval/success" in report.scalars
        assert next(trainer).scalars["faults/worker_restarts"] == 2


# --- the disk -------------------------------------------------------------------------------------------------------


class Disk:
    """Makes ``save_checkpoint`` fail while ``full``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.full = False
        patch.setattr(sinks, "save_checkpoint", self.save)
        patch.setattr(sinks, "RETRY_SECONDS", 0.0)

    def save(self, path: Path, tree: dict[str, Any]) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_checkpoint(path, tree)


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    config = tiny(train={"checkpoint_every": 1, "keep_checkpoints": 9}, total_steps=384)
    with Trainer(config, tmp_path / "run") as trainer:
        run = RunDir(tmp_path / "run")
        next(trainer)
        disk.full = True
        notes = [note for _ in range(3) for note in next(trainer).notes]
        assert [path.stem for path in run.periodic()] == ["iteration_0000001"], "the old checkpoint stays"
        disk.full = False
        notes += [note for report in finish(trainer) for note in report.notes]
    assert len(notes) == 2 and "No space left" in notes[0] and notes[1].endswith("checkpoints could be written again")
    assert [path.stem[-1] for path in run.periodic()] == ["1", "5", "6"]
    assert len(read_metrics(run.metrics)) == 6


def test_a_disk_that_stays_full_ends_the_run_when_its_minutes_are_over() -> None:
    now = 0.0
    guard = sinks.WriteGuard(30, clock=lambda: now)

    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert not guard.try_write("metrics", write)
    assert guard.try_write("metrics", lambda: None)
    now = 10_000
    assert not guard.try_write("metrics", write), "its time begins anew"
    now += 29 * 60
    assert not guard.try_write("metrics", write)
    now += 60
    with pytest.raises(sinks.UnwritableError, match=r"could not write metrics for 30 minutes.*No space"):
        guard.try_write("metrics", write)
    assert len(guard.notes) == 3


def test_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is waited for, and the user is told."""
    disk = Disk(monkeypatch)
    with Trainer(tiny(train={"checkpoint_every": 50}), tmp_path / "run") as trainer:
        for _ in range(3):
            next(trainer)
        disk.full = True
        monkeypatch.setattr(sinks, "sleep", lambda _: setattr(disk, "full", False))
        with pytest.warns(UserWarning, match=r"can't write checkpoints \(No space left"):
            next(trainer)
    assert RunDir(tmp_path / "run").newest().name == "iteration_0000004.pt"


LIMITED = """
import resource, signal, sys
from ppo_tbptt.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("size", [0, 2_000, 6_000])
def test_files_that_can_really_not_be_written(size: int, tmp_path: Path) -> None:
    """No file may become larger than ``size``: none at all, no metrics, or metrics and no checkpoint."""
    path, run = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(tiny(train={"max_unwritable_minutes": 0.0}).to_toml())
    command = [sys.executable, "-c", LIMITED, str(size), "train", str(path), "--run-dir", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert done.stderr.startswith("error: ") and "too large" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(run.rglob("*.pt"))


# --- numbers --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_once_and_then_for_good(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(train={"checkpoint_every": 1, "max_nonfinite_updates": 6}, ppo={"sequence_length": 4, "burn_in": 2})
    with Trainer(config, run) as trainer:
        trainer.learner.auxiliary.append(poison(lambda k: k == 1 or k >= 4))
        report = next(trainer)
        assert report.scalars["faults/nonfinite_updates"] == 1 and "1 of 4 updates skipped" in report.notes[0]
        with pytest.raises(NonFiniteError, match="6 updates in a row"):
            list(trainer)
    assert RunDir(run).newest().name == "iteration_0000002.pt"
    assert all(x.isfinite().all() for x in load_checkpoint(RunDir(run).newest())["agent"].values())
    saved = torch.load(run / "nonfinite_rank0.pt", weights_only=True)
    assert saved["iteration"] == 3
    assert len(saved["minibatch"]["value"]) > 0
    for steps in (saved["minibatch"], saved["minibatch"]["burn_in"]):
        assert all(x.isfinite().all() for x in steps["obs"].values())


# --- the rest -------------------------------------------------------------------------------------------------------


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    with Trainer(tiny(train={"checkpoint_every": 1}), tmp_path / "run") as trainer:
        next(trainer)
        before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        with pytest.raises(RunDirError, match=rf"another training \(process {os.getpid()}\)"):
            Trainer.resume(tmp_path / "run")
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
        next(trainer)
    Trainer.resume(tmp_path / "run").close()


def test_a_full_gpu_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(tiny(train={"checkpoint_every": 1}).to_toml())
    iterations = itertools.count(1)

    def targets(*args: Any, **kwargs: Any) -> Any:
        if next(iterations) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore text")
        return compute_targets(*args, **kwargs)

    monkeypatch.setattr("ppo_tbptt.training.trainer.compute_targets", targets)
    assert main(["train", str(path), "--run-dir", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "env.num_envs" in error[0] and "ppo.num_minibatches" in error[0]
    assert RunDir(tmp_path / "run").newest().name == "iteration_0000002.pt"


def test_a_budget_of_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(tiny(total_steps=10**9).to_toml())
    assert main(["train", str(path), "--run-dir", str(run), "--max-minutes", "0.02"]) == 124
    assert "go on with" in capsys.readouterr().out
    done = read_metrics(run / "metrics.jsonl")[-1]["iteration"]
    assert RunDir(run).newest() == RunDir(run).checkpoint(int(done))
    assert main(["train", str(path), "--run-dir", str(run), "--max-minutes", "nan"]) == 2


def test_a_signal_drops_a_long_iteration_and_nothing_else(tmp_path: Path) -> None:
    """The first iteration would take minutes; what is left behind resumes."""
    path, run = tmp_path / "config.toml", tmp_path / "run"
    long = tiny(total_steps=10**6, ppo={"rollout_steps": 100_000, "num_minibatches": 50_000, "num_epochs": 100})
    path.write_text(long.to_toml())
    with start(path, run) as process:
        while not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    assert [path.name for path in RunDir(run).periodic()] == ["iteration_0000000.pt"]
    assert json.dumps(load_checkpoint(RunDir(run).newest())["iteration"]) == "0"
