"""Whole iterations: determinism, resuming, what lands in the run folder."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import TINY, tiny

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.envs import VectorEnv
from ppo_tbptt.evaluation.statistics import Estimate
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint
from ppo_tbptt.run.folder import RunDirError
from ppo_tbptt.run.metrics import MetricsWriter, Report, read_metrics
from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer


def rows(config: Config, run_dir: Path | None = None) -> list[dict[str, float]]:
    """One row per iteration, without what depends on the clock."""
    with Trainer(config, run_dir) as trainer:
        return [timeless(report.row()) for report in trainer]


def timeless(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def test_equal_seeds_give_equal_metrics_and_others_differ() -> None:
    first = rows(tiny())
    assert len(first) == 4
    assert first == rows(tiny())
    assert first != rows(tiny(seed=2))


@pytest.mark.parametrize("env_id", ["ppo_tbptt/PocMemory-v0", "MortarMayhem-Grid-v0"])
def test_the_number_of_workers_changes_nothing(env_id: str) -> None:
    small = {"total_steps": 128, "model": {"hidden_size": 16, "cnn_channels": [4, 4, 4]}}
    runs = [rows(tiny(env={"id": env_id, "num_workers": n}, **small)) for n in (0, 1, 3)]
    assert runs[0] == runs[1] == runs[2]


def pids(trainer: Trainer) -> list[int]:
    assert isinstance(trainer.envs, VectorEnv)
    return trainer.envs.worker_pids


def test_ranks_divide_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six cores three ranks have two each, of two cores one; what is asked for by number holds for each rank."""
    for cores, asked, workers in [(6, "auto", 2), (2, "auto", 1), (6, 4, 4)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        with Trainer(tiny(env={"num_workers": asked}), world=World(local_size=3)) as trainer:
            assert len(pids(trainer)) == workers


def test_double_buffering_changes_nothing_but_rounding() -> None:
    """Five environments make uneven halves, each with two workers of its own."""
    rows = []
    for setting in ("off", "on"):
        with Trainer(tiny(env={"num_envs": 5, "num_workers": 2, "double_buffering": setting})) as trainer:
            assert len(pids(trainer)) == (4 if setting == "on" else 2)
            assert trainer.envs.where == ("in two halves of 2 workers each" if setting == "on" else "in 2 workers")
            assert trainer.envs.groups == ((slice(0, 3), slice(3, 5)) if setting == "on" else (slice(0, 5),))
            rows.append([timeless(report.scalars) for report in trainer])
    for whole, halves in zip(*rows, strict=True):
        assert halves == pytest.approx(whole, rel=1e-3, abs=1e-5)


def test_a_tag_without_data_is_left_out() -> None:
    """No episode ends within 2 x 8 steps of a task that lasts 1000."""
    with Trainer(tiny(env={"id": "fixture_envs:fixture/Faulty-v0"}, ppo={"rollout_steps": 8})) as trainer:
        report = next(trainer)
    assert report.scalars["episode/count"] == 0
    assert not [tag for tag in report.scalars if tag.startswith("episode/") and tag != "episode/count"]
    assert all(value == value for value in report.scalars.values())  # no NaN


def test_report_of_the_poc_task() -> None:
    with Trainer(tiny()) as trainer:
        reports = list(trainer)
    assert [r.env_steps for r in reports] == [64, 128, 192, 256]
    expected = {"episode/return", "episode/success", "loss/policy", "loss/value", "policy/entropy", "policy/approx_kl"}
    expected |= {"policy/clip_fraction", "policy/explained_variance", "optim/learning_rate", "optim/grad_norm"}
    expected |= {"sequences/count", "sequences/mean_length", "sequences/padding_fraction", "time/steps_per_second"}
    assert expected <= set().union(*(r.scalars for r in reports))
    first = reports[0].scalars
    parts = {"inference", "environments", "transfer", "sequences", "learning"}
    whole = {"iteration_seconds", "steps_per_second"}
    assert {tag for tag in first if tag.startswith("time/")} == {f"time/{name}" for name in parts | whole}
    assert 0 < sum(first[f"time/{part}"] for part in parts) <= 1
    assert first["time/iteration_seconds"] * first["time/steps_per_second"] == pytest.approx(64)
    assert first["sequences/count"] * first["sequences/mean_length"] == pytest.approx(64)
    assert 0 <= first["sequences/padding_fraction"] < 1
    assert first["policy/entropy"] == pytest.approx(math.log(2), abs=0.02)  # 2 actions, untrained


def test_schedules_reach_the_optimiser() -> None:
    schedule = {"initial": 1e-3, "final": 0.0, "over_steps": 256}
    learned = [row["optim/learning_rate"] for row in rows(tiny(ppo={"learning_rate": schedule}))]
    assert learned == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_target_kl_stops_after_the_first_epoch_that_exceeds_it() -> None:
    fast = {"learning_rate": 0.1, "num_epochs": 3}
    assert rows(tiny(ppo=fast))[0]["optim/updates"] == 6
    assert rows(tiny(ppo={**fast, "target_kl": 1e-6}))[0]["optim/updates"] == 2


def test_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(train={"eval_every": 2})
    written = rows(config, run)
    assert Config.load(run / "config.toml") == config.replace(precision="float32")  # resolved
    assert [timeless(row) for row in read_metrics(run / "metrics.jsonl")] == written
    assert "eval/success" in written[1]
    assert "eval/success" not in written[0]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "best.pt",
        "iteration_0000002.pt",
        "iteration_0000004.pt",
    ]
    assert list(run.glob("events.out.tfevents.*"))
    with pytest.raises(RunDirError, match="exists already"):
        Trainer(config, run)


def test_best_is_the_first_of_the_highest_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.25, 0.75, 0.75, 0.5])
    config = tiny(train={"eval_every": 1})
    with Trainer(config, tmp_path / "run") as trainer:
        result = trainer.evaluate()

        def evaluate(*_: Any, **__: Any) -> Any:
            score = next(scores)
            return replace(result, measures={**result.measures, "success": Estimate(mean=score, ci95=None)})

        monkeypatch.setattr("ppo_tbptt.training.callbacks.evaluate", evaluate)
        assert [report.scalars["eval/success"] for report in trainer] == [0.25, 0.75, 0.75, 0.5]
        assert trainer.checkpoints.best == 0.75
    best = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    assert (best["iteration"], best["best"]) == (2, 0.75)


def test_a_best_that_could_not_be_written_is_not_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.25, 0.75, 0.5, 0.25])
    with Trainer(tiny(train={"eval_every": 1}), tmp_path / "run") as trainer:
        result = trainer.evaluate()

        def evaluate(*_: Any, **__: Any) -> Any:
            return replace(result, measures={**result.measures, "success": Estimate(mean=next(scores), ci95=None)})

        monkeypatch.setattr("ppo_tbptt.training.callbacks.evaluate", evaluate)
        next(trainer)
        with monkeypatch.context() as patch:
            patch.setattr("ppo_tbptt.run.sinks.save_checkpoint", no_space)
            next(trainer)
        assert trainer.checkpoints.best == 0.25
        assert "No space left" in next(trainer).notes[0]
        assert trainer.checkpoints.best == 0.5
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")["iteration"] == 3


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    rows(tiny(train={"checkpoint_every": 1, "keep_checkpoints": 2}), tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iteration_*"))
    assert kept == ["iteration_0000003.pt", "iteration_0000004.pt"]


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    config = tiny(total_steps=384, train={"checkpoint_every": 4, "checkpoint_minutes": 1e-9, "keep_checkpoints": 9})
    rows(config, tmp_path / "often")
    assert len(list((tmp_path / "often" / "checkpoints").glob("iteration_*"))) == 6
    rows(config.replace(train={"checkpoint_minutes": None}), tmp_path / "seldom")
    assert len(list((tmp_path / "seldom" / "checkpoints").glob("iteration_*"))) == 2


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a run folder"):
        Trainer.resume(tmp_path / "nothing")
    Trainer(tiny(), tmp_path / "run").close()
    with pytest.raises(CheckpointError, match="no checkpoint in this run yet"):
        Trainer.resume(tmp_path / "run")


def test_checkpoints_hold_no_pickled_objects(tmp_path: Path) -> None:
    rows(tiny(), tmp_path / "run")
    tree = load_checkpoint(tmp_path / "run" / "checkpoints" / "iteration_0000004.pt")  # weights_only
    json.dumps(tree["config"])
    json.dumps(tree["spec"])


def test_what_does_not_fit_the_machine_or_the_environment() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no CUDA"):
            Trainer(Config.from_dict({**TINY, "device": "cuda"}))
    with pytest.raises(ConfigError, match="too small for the CNN"):
        Trainer(tiny(env={"id": "test_trainer:small/Frames-v0"}))


def test_metrics_leave_out_what_is_not_finite_and_torn_lines(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(Report(iteration=1, env_steps=10, scalars={"loss/total": 1.0}))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "env_st')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"iteration": 1, "env_steps": 10, "loss/total": 1.0}]


def _register_small_frames() -> None:
    import gymnasium as gym
    import numpy as np

    class Frames(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(0, 255, (20, 20, 3), np.uint8)
        action_space: gym.spaces.Space[Any] = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return np.zeros((20, 20, 3), np.uint8), {}

        def step(self, action: int) -> Any:
            return np.zeros((20, 20, 3), np.uint8), 0.0, False, False, {}

    if "small/Frames-v0" not in gym.registry:
        gym.register("small/Frames-v0", entry_point=lambda **_: Frames())


_register_small_frames()
