"""The compiled encoder: an uncompiled run's numbers, and a run that goes on where nothing can be compiled."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from configs_for_tests import tiny
from helpers import small_agent, timeless
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models import Agent
from ppo_tbptt.models.compile import CompileError, Encode, compile_encoder
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer

FRAMES = tiny(
    total_steps=192,
    distinct_frames="off",  # of less than 16 frames torch calls the encoder itself
    env={"id": "MortarMayhem-Grid-v0"},
    model={"hidden_size": 16, "cnn_channels": [4, 4, 4]},
    core={"num_layers": 2, "dropout": 0.2},  # which uses torch's own random stream
    train={"eval_num_seeds": 1, "eval_repeats": 1},
)

# In a process of its own, because the import hook's checks can't be compiled. An update that the compiled code is not
# made for would go without it; here it fails.
TRAIN = """
import sys, torch
from ppo_tbptt.cli import main
calls, stance = [], torch.compiler.set_stance
torch.compiler.set_stance = lambda name: (calls.append(name), stance("fail_on_recompile"))[1]
code = main(["train", *sys.argv[1:]])
print(len(calls), "compiled updates")
sys.exit(code)
"""
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


def train(folder: Path, config: Config, **environment: str) -> list[str]:
    """The lines that a training in ``folder / "run"`` prints, with no compiled code from before."""
    (folder / "config.toml").write_text(config.to_toml())
    command = [sys.executable, "-c", TRAIN, folder / "config.toml", "--run-dir", folder / "run"]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def metrics(run: Path) -> list[dict[str, float]]:
    return [timeless(row) for row in read_metrics(run / "metrics.jsonl")]


@pytest.mark.parametrize(("num_minibatches", "num"), [(2, 32), (64, 2)])
def test_it_is_compiled_once_on_a_minibatch_and_used_in_every_update(
    num_minibatches: int, num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands for the compiled encoder is the encoder; a minibatch of one step is compiled as one of two."""
    tried: list[dict[str, tuple[Any, ...]]] = []
    calls: list[int] = []

    def compile_encoder(agent: Agent, obs: Mapping[str, Tensor]) -> Encode:
        tried.append({key: (tuple(x.shape), x.dtype) for key, x in obs.items()})
        return lambda obs: (calls.append(1), agent.encoder(obs))[1]

    monkeypatch.setattr("ppo_tbptt.training.build.compile_encoder", compile_encoder)
    config = FRAMES.replace(total_steps=64, ppo={"num_minibatches": num_minibatches}, compile=True)
    with Trainer(config) as trainer:
        report = next(trainer)
        assert trainer.notes == [] and report.notes == ()
    with Trainer(config.replace(compile=False)) as trainer:
        plain = next(trainer)
    assert tried == [{"obs": ((num, 84, 84, 3), torch.uint8)}]
    assert len(calls) == report.scalars["optim/updates"]
    assert report.scalars["loss/total"] == plain.scalars["loss/total"]


def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_encoder(agent: Agent, obs: Mapping[str, Tensor]) -> Encode:
        raise CompileError("no compiler")

    monkeypatch.setattr("ppo_tbptt.training.build.compile_encoder", compile_encoder)
    with Trainer(tiny(compile=True)) as trainer:
        assert trainer.notes == ["not compiled, training goes on without: no compiler"]
        assert trainer.learner.encode is None


@needs_compiler
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_uncompiled_runs_numbers(precision: str, tmp_path: Path) -> None:
    config = FRAMES.replace(precision=precision)
    plain = helpers.train(config, tmp_path / "plain")
    lines = train(tmp_path, config.replace(compile=True))
    assert "12 compiled updates" in lines
    assert not [line for line in lines if "not compiled" in line]

    run, tolerance = tmp_path / "run", 1e-4 if precision == "float32" else 0.05
    for want, got in zip(plain[:2], metrics(run), strict=False):
        assert got == pytest.approx(want, rel=tolerance, abs=1e-5)
    agents = [load_checkpoint(RunDir(path).newest())["agent"] for path in (tmp_path / "plain", run)]
    torch.testing.assert_close(agents[1], agents[0], rtol=tolerance, atol=tolerance)
    Policy.load(run)
    with Trainer.resume(run, {"compile": False, "total_steps": 256}) as trainer:
        assert "changed: compile: True -> False" in trainer.notes
        assert next(trainer).iteration == 4


def test_without_a_compiler_it_says_so_in_one_line_and_goes_on(tmp_path: Path) -> None:
    plain = helpers.train(FRAMES)
    lines = train(tmp_path, FRAMES.replace(compile=True), CXX=str(tmp_path / "none"))
    (line,) = [line for line in lines if line.startswith("not compiled")]
    assert "training goes on without: InvalidCxxCompiler: No working C++ compiler found" in line
    assert "0 compiled updates" in lines
    assert metrics(tmp_path / "run") == plain  # random streams included


def test_without_memory_it_is_not_the_compilers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(module: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(torch.OutOfMemoryError):
        compile_encoder(small_agent(), {"obs": torch.zeros(4, 5)})
