"""Two ranks on the CPU train as one process would on the union of their steps, and none outlives another's death."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ranks import CASES, cut_of, data, environment, everything, free_port, permutations, run_ranks, update
from torch import Tensor

from ppo_tbptt.ppo import learner as learner_module
from ppo_tbptt.ppo.sequences import split
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(everything, folder)


def counted(name: str) -> list[Tensor]:
    """Steps that count of each rank's sequences."""
    length = CASES[name].sequence_length
    return [cut_of(name)(data((rank,), torch.float32)[1].start, length).counted for rank in range(2)]


def partition(name: str) -> list[list[list[Tensor]]]:
    """The minibatches [epoch][rank] that two ranks draw by themselves, their sequences numbered within each rank."""
    config = CASES[name]
    generators = [permutations(rank) for rank in range(2)]
    return [
        [split(x, config.num_minibatches, g, keep_empty=True) for x, g in zip(counted(name), generators, strict=True)]
        for _ in range(config.num_epochs)
    ]


def alone(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The update of a single process on the union, with the ranks' partition."""
    first = len(counted(name)[0])  # rank 1's sequences come after
    epochs = iter(partition(name))

    def union(*_: Any, **__: Any) -> list[Tensor]:
        groups = [torch.cat((a, b + first)) for a, b in zip(*next(epochs), strict=True)]
        return [ids for ids in groups if len(ids)]

    monkeypatch.setattr(learner_module, "split", union)
    return update((0, 1), name, dtype, World())


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [name for name in CASES if name != "whole update"])
def test_gradients_equal_those_of_the_union(
    name: str, dtype: torch.dtype, ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(name, dtype, monkeypatch)
    own = [rank["updates"][name, str(dtype)] for rank in ranks]
    assert len(own[0]["gradients"]) == len(expected["gradients"]) > 2
    for first, second, one in zip(own[0]["gradients"], own[1]["gradients"], expected["gradients"], strict=True):
        assert torch.equal(first, second)
        assert relative(first, one) < TOLERANCE[dtype]


def test_whole_update_equals_that_of_the_union(ranks: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Normalised advantages, several epochs, clipping and AdamW; and the figures that are reported."""
    expected = alone("whole update", torch.float64, monkeypatch)
    own = [rank["updates"]["whole update", str(torch.float64)] for rank in ranks]
    assert torch.equal(own[0]["parameters"], own[1]["parameters"])
    assert relative(own[0]["parameters"], expected["parameters"]) < 1e-10
    before = torch.cat([p.detach().flatten() for p in data((0,), torch.float64)[0].parameters()])
    assert relative(before, expected["parameters"]) > 1e-3  # it was an update
    assert max(float(g.norm()) for g in expected["gradients"]) > CASES["whole update"].max_grad_norm  # and clipped
    assert own[0]["figures"] == own[1]["figures"] == pytest.approx(expected["figures"], rel=1e-6)


def test_the_cases_are_what_they_say() -> None:
    """Ranks hold different numbers of steps of a minibatch, and one has no steps of some."""
    for name in CASES:
        pairs = [
            [int(x[ids].sum()) for x, ids in zip(counted(name), pair, strict=True)]
            for epoch in partition(name)
            for pair in zip(*epoch, strict=True)
        ]
        assert any(a != b for a, b in pairs)
        assert any(a and not b for a, b in pairs) == (name == "few sequences")
    assert any((x == 0).any() for x in counted("warm-up steps"))


def test_talking(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        heard = rank["talk"]
        assert heard["json"] == [{"rank": r, "text": "ä" * r, "number": 0.1} for r in range(2)]
        assert heard["largest"] == 5
        assert heard["broadcast"] == [0, 0, 0]
        assert heard["variance"] == pytest.approx(np.var([0, 1, 2, 3, 10, 11, 12, 13], ddof=1))


def test_whole_runs_agree_on_all_but_the_clock(ranks: list[dict[str, Any]], folder: Path) -> None:
    first, second = (rank["train"] for rank in ranks)
    assert first["rows"] == second["rows"]
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["iterations"] == 3
    assert [row["env_steps"] for row in first["rows"]] == [128, 256, 384]  # over both ranks
    assert "eval/success" in first["rows"][1]
    assert first["rows"][0]["sequences/count"] * first["rows"][0]["sequences/mean_length"] == pytest.approx(128)
    written = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in written] == [1, 2, 3]  # one row each
    assert len(list((folder / "run").glob("events.out.tfevents.*"))) == 2  # rank 0's, of each of the two parts


def test_every_rank_has_random_streams_of_its_own_and_they_go_on(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["train"] for rank in ranks)
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
        assert any("the checkpoint is of 2 rank(s)" in note for note in trainer.notes)
        assert trainer.env_steps == 384
        assert trainer.num_iterations == 3 + 2
        seeds = trainer.state_dict()["level_seeds"]
        parameters = torch.cat([p.detach().flatten() for p in trainer.agent.parameters()])
        assert torch.equal(parameters, ranks[0]["train"]["parameters"])
        assert not torch.equal(trainer.rng.noise.get_state(), tree["generators"]["noise"])
        assert [report.env_steps for report in trainer] == [448, 512]
    assert seeds == [count + 1 for count in tree["level_seeds"][:4]]


def test_one_device_for_several_ranks_is_refused() -> None:
    world = World(rank=1, size=2, local_rank=1, local_size=2)
    assert world.device_name("cpu") == "cpu"
    assert world.device_name("cuda") == "cuda:1"
    with pytest.raises(DeviceError, match="2 ranks need a device each"):
        world.device_name("cuda:0")


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

    def train(ranks: int, *arguments: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", TRAIN]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = train(2, POC, "--run-dir", str(run), "--total-steps=256", *SMALL, "--env.num-workers=0")
    assert "on each of 2 ranks" in out
    assert out.count("held-out level seeds") == 1
    for ranks, steps in ((2, 512), (1, 640), (2, 768)):
        (run / "evaluations" / "final.json").unlink()
        out = train(ranks, "--resume", str(run), f"--total-steps={steps}")
        assert ("begin new random streams" in out) == (steps > 512)
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 8))
    assert [row["env_steps"] for row in rows] == [128, 256, 384, 512, 576, 640, 768]
