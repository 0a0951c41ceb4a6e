"""Two ranks on the CPU train together, go on together, and none outlives another's death.

That their updates are those of one process on the union of their steps is in `test_reference_training.py`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import fake_rollout, small_agent, starts, warmed_up
from ranks import environment, free_port, run_ranks, train
from reference_curriculum import CONFIG, check, stages_of

from ppo_tbptt.envs import Episode, WorkerError
from ppo_tbptt.ppo.all_reduce import all_reduce_moments, all_reduce_steps
from ppo_tbptt.ppo.sequences import split
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.report import FaultCounts, explained_variance
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Targets

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(train, folder)


def test_whole_runs_agree_on_all_but_the_clock(ranks: list[dict[str, Any]], folder: Path) -> None:
    first, second = ranks
    assert first["rows"] == second["rows"]
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["iterations"] == 3
    assert [row["env_steps"] for row in first["rows"]] == [128, 256, 384]  # over both ranks
    assert {"eval/success", "memory/gradient_horizon", "memory/stale_kl"} <= first["rows"][1].keys()
    assert first["rows"][0]["sequences/count"] * first["rows"][0]["sequences/mean_length"] == pytest.approx(128)
    written = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in written] == [1, 2, 3]  # one row each
    assert len(list((folder / "run").glob("events.out.tfevents.*"))) == 2  # rank 0's, of each of the two parts


def test_every_rank_has_random_streams_of_its_own_and_they_go_on(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert not set(first["first seeds"]) & set(second["first seeds"])
    saved, resumed = first["saved"], first["resumed"]
    (other,) = saved["generators_of_other_ranks"]
    for name, state in saved["generators"].items():
        assert not torch.equal(state, other[name])
        assert torch.equal(state, resumed["generators"][name])
        assert torch.equal(other[name], resumed["generators_of_other_ranks"][0][name])
    assert resumed["level_seeds"] == saved["level_seeds"]  # all are in the middle of their episodes
    for key in ("start", "state", "seed", "steps", "digest", "actions"):
        for before, after in zip(saved["environments"], resumed["environments"], strict=True):
            assert torch.equal(before[key], after[key])
    assert len(saved["level_seeds"]) == 8


def test_resume_with_another_number_of_ranks(ranks: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    tree = load_checkpoint(run / "checkpoints" / "iteration_0000003.pt")
    with Trainer.resume(run, {"total_steps": 500}) as trainer:
        assert "not exact: all environments begin new episodes, because the number of ranks is another" in trainer.notes
        assert any("the checkpoint is of 2 rank(s)" in note for note in trainer.notes)
        assert trainer.env_steps == 384
        assert trainer.num_iterations == 3 + 2
        seeds = trainer.state_dict()["level_seeds"]
        parameters = torch.cat([p.detach().flatten() for p in trainer.agent.parameters()])
        assert torch.equal(parameters, ranks[0]["parameters"])
        assert not torch.equal(trainer.rng.noise.get_state(), tree["generators"]["noise"])
        assert [report.env_steps for report in trainer] == [448, 512]
    assert seeds == [count + 1 for count in tree["level_seeds"][:4]]


def test_a_curriculum_follows_all_ranks(ranks: list[dict[str, Any]], folder: Path) -> None:
    """In order of time, not of rank; also when it is resumed, even by one rank."""
    first, second = (rank["curriculum"] for rank in ranks)
    assert first == second
    iterations = [[Episode(*fields) for fields in row] for row in first["episodes"]]
    check(CONFIG.replace(env={"num_envs": 3}), first["rows"], iterations, ranks=2)
    assert stages_of(first["rows"])[-1] == 3
    with Trainer.resume(folder / "curriculum", {"total_steps": 2000}) as trainer:
        assert next(trainer).scalars["curriculum/stage"] == 3


def test_one_device_for_several_ranks_is_refused() -> None:
    world = World(rank=1, size=2, local_rank=1, local_size=2)
    assert world.device_name("cpu") == "cpu"
    assert world.device_name("cuda") == "cuda:1"
    with pytest.raises(DeviceError, match="2 ranks need a device each"):
        world.device_name("cuda:0")


@pytest.mark.parametrize(("num_ranks", "row"), [(2, [3, 4, 5]), (1, [0, 1, 2]), (3, [0, 1, 2])])
def test_counts_of_faults_go_on_by_rank(num_ranks: int, row: list[int]) -> None:
    """Where there are as many ranks as before; otherwise with those of rank 0."""
    faults = FaultCounts(World(rank=1, size=2), 7)
    faults.load_state_dict([[3 * rank, 3 * rank + 1, 3 * rank + 2] for rank in range(num_ranks)])
    assert [faults.cut_episodes, faults.nonfinite_updates] == row[1:]


def test_restarts_of_workers_are_counted_over_all_parts_of_a_run() -> None:
    faults = FaultCounts(World(), 7)
    assert faults.state_dict() == [[0, 0, 0]]
    faults.load_state_dict([[2, 3, 4]])
    faults.budget.spend(WorkerError("gone"), "restarted")
    assert faults.state_dict() == [[3, 3, 4]]
    tags = ("worker_restarts", "cut_episodes", "nonfinite_updates")
    assert faults.scalars() == {f"faults/{tag}": count for tag, count in zip(tags, (3, 3, 4), strict=True)}


def test_where_all_returns_are_equal_nothing_is_explained() -> None:
    rollout = fake_rollout(small_agent(), starts())
    ones = torch.ones_like(rollout.value)
    assert explained_variance(rollout, Targets(advantage=ones, value_target=ones), World()) == {}


# --- processes -----------------------------------------------------------------------------------------------------

SMALL = ["--env.num-envs=4", "--ppo.rollout-steps=16", "--ppo.num-minibatches=2", "--ppo.sequence-length=8"]
SMALL += ["--train.eval-num-seeds=3", "--train.eval-repeats=1", "--device=cpu"]
POC = str(ROOT / "configs" / "toy_poc_memory.toml")
TRAIN = str(ROOT / "scripts" / "train.py")


def wait_until(done: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks past their first iteration, which train until they are stopped; as torchrun starts them."""
    run, port = tmp_path / "run", free_port()
    command = [sys.executable, TRAIN, POC, "--run-dir", str(run), "--total-steps=1e9", *SMALL, "--env.num-workers=1"]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment(rank, 2, port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    metrics = run / "metrics.jsonl"
    try:
        assert wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 60)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_other(victim: int, two_ranks: list[subprocess.Popen[str]]) -> None:
    """Within seconds, with one line, and with all workers of both."""
    workers = [worker for process in two_ranks for worker in psutil.Process(process.pid).children()]
    assert len(workers) == 2
    two_ranks[victim].kill()
    other = two_ranks[1 - victim]
    _, error = other.communicate(timeout=20)
    assert other.returncode == 1
    assert error.startswith(f"error: rank {1 - victim} of 2: another rank is gone")
    assert error.count("\n") == 1
    two_ranks[victim].communicate()
    assert not psutil.wait_procs(workers, timeout=10)[1]


def test_a_signal_to_any_rank_stops_all_after_the_same_iteration(
    two_ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    two_ranks[1].send_signal(signal.SIGTERM)
    (out, error), (silent, other_error) = (process.communicate(timeout=30) for process in two_ranks)
    assert [process.returncode for process in two_ranks] == [143, 143]
    assert "--resume" in out
    assert (silent, error, other_error) == ("", "", "")
    done = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert len(load_checkpoint(tmp_path / "run" / "checkpoints" / f"iteration_{done:07d}.pt")["level_seeds"]) == 8


@pytest.mark.slow
def test_torchrun_trains_and_resumes_with_any_number_of_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"

    def torchrun(ranks: int, *arguments: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", TRAIN]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = torchrun(2, POC, "--run-dir", str(run), "--total-steps=256", *SMALL, "--env.num-workers=0")
    assert "on each of 2 ranks" in out
    assert out.count("held-out level seeds") == 1
    for ranks, steps in ((2, 512), (1, 640), (2, 768)):
        (run / "evaluations" / "final.json").unlink()
        out = torchrun(ranks, "--resume", str(run), f"--total-steps={steps}")
        assert ("begin new random streams" in out) == (steps > 512)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 8))
    assert [row["env_steps"] for row in rows] == [128, 256, 384, 512, 576, 640, 768]


def test_moments_of_minibatches_are_those_of_the_steps_that_count() -> None:
    start = starts()
    sequences, advantage = warmed_up(start, 6), torch.randn(start.shape)
    groups = split(sequences.counted, 3, torch.Generator())
    parts = all_reduce_moments(World(), advantage, sequences, all_reduce_steps(World(), groups, sequences.counted))
    assert len(parts) == 3
    for part in parts:
        counts = sequences.in_loss[:, part.ids]  # type: ignore[index]
        counted = advantage.flatten()[sequences.index[:, part.ids][counts]]
        torch.testing.assert_close(part.moments, (counted.mean(), counted.std(correction=0)))
