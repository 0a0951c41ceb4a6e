"""Whole iterations: determinism, resuming, what lands in the run folder."""

import errno
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import TINY, tiny
from helpers import timeless, train

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.envs import EnvSpec, VectorEnv
from ppo_tbptt.envs.interface import ArraySpec
from ppo_tbptt.evaluation.statistics import Estimate
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint
from ppo_tbptt.run.folder import RunDirError
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer


def pids(trainer: Trainer) -> list[int]:
    assert isinstance(trainer.envs, VectorEnv)
    return trainer.envs.worker_pids


def test_ranks_divide_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six cores three ranks have two each, of two cores one; what is asked for by number holds for each rank."""
    for cores, asked, workers in [(6, "auto", 2), (2, "auto", 1), (6, 4, 4)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: range(n), raising=False)
        with Trainer(tiny(env={"num_workers": asked}), world=World(local_size=3)) as trainer:
            assert len(pids(trainer)) == workers


@pytest.mark.parametrize("env_id", ["ppo_tbptt/PocMemory-v0", "MortarMayhem-Grid-v0"])
def test_the_number_of_workers_changes_nothing(env_id: str) -> None:
    small = {"total_steps": 128, "model": {"hidden_size": 16, "cnn_channels": [4, 4, 4]}}
    runs = [train(tiny(env={"id": env_id, "num_workers": n}, **small)) for n in (0, 1, 3)]
    assert runs[0] == runs[1] == runs[2]


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


@pytest.mark.parametrize(
    ("setting", "groups"),
    [("auto", (slice(0, 5),)), ("off", (slice(0, 5),)), ("on", (slice(0, 3), slice(3, 5)))],
)
def test_environments_are_in_halves_where_the_config_says_so(
    setting: str, groups: tuple[slice, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself it asks for them on a GPU alone, however many there are."""
    monkeypatch.setattr("ppo_tbptt.envs.batched.TWO_GROUPS_FROM", 5)
    with Trainer(tiny(env={"num_envs": 5, "double_buffering": setting})) as trainer:
        assert trainer.envs.groups == groups


def test_what_a_checkpoint_holds() -> None:
    """Without replay nothing of the environments but the carry."""
    for replay, more in [(True, {"seed", "stage", "steps", "digest", "actions"}), (False, set[str]())]:
        with Trainer(tiny(env={"replay": replay})) as trainer:
            tree = trainer.state_dict()
        assert tree["version"] == version("ppo-tbptt")
        assert tree["environments"][0].keys() == {"start", "state"} | more


@pytest.mark.parametrize("saved", [None, True, False])
@pytest.mark.parametrize(("setting", "wanted"), [("on", True), ("off", False), ("auto", None)])
def test_how_frames_are_stored_is_the_configs_choice_or_that_of_the_run_before(
    saved: bool | None, setting: str, wanted: bool | None
) -> None:
    config = tiny(distinct_frames=setting)
    with Trainer(config) as trainer:
        tree = trainer.state_dict()
    assert tree["distinct_frames"] == [wanted]
    with Trainer(config, restore={**tree, "distinct_frames": [saved]}) as trainer:
        assert trainer.state_dict()["distinct_frames"] == [saved if setting == "auto" else wanted]
        assert trainer.iteration == 0 and trainer.notes == []


def test_times_of_an_iteration() -> None:
    with Trainer(tiny()) as trainer:
        scalars = next(trainer).scalars
    times = {tag.removeprefix("time/"): value for tag, value in scalars.items() if tag.startswith("time/")}
    assert times.pop("iteration_seconds") * times.pop("steps_per_second") == pytest.approx(64)
    assert times.keys() == {"inference", "environments", "transfer", "sequences", "learning"}
    assert 0 < sum(times.values()) <= 1


def test_run_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny(train={"eval_every": 2})
    written = train(config, run)
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


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"checkpoint_every": 1, "keep_checkpoints": 2}, [5, 6]),
        ({"checkpoint_every": 4, "keep_checkpoints": 9}, [4, 6]),
        ({"checkpoint_every": 4, "keep_checkpoints": 9, "checkpoint_minutes": 1e-9}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_checkpoints_are_due_by_iterations_and_by_the_clock_and_the_newest_are_kept(
    settings: dict[str, Any], kept: list[int], tmp_path: Path
) -> None:
    train(tiny(total_steps=384, train=settings), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iteration_*"))
    assert names == [f"iteration_{number:07d}.pt" for number in kept]


def test_a_closed_trainer_saves_nothing_and_says_so(tmp_path: Path) -> None:
    trainer = Trainer(tiny(), tmp_path / "run")
    next(trainer)
    trainer.close()
    with pytest.raises(RuntimeError, match="closed"):
        trainer.save()


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="not a run folder"):
        Trainer.resume(tmp_path / "nothing")
    Trainer(tiny(), tmp_path / "run").close()
    with pytest.raises(CheckpointError, match="no checkpoint in this run yet"):
        Trainer.resume(tmp_path / "run")


def test_what_does_not_fit_the_machine_or_the_environment() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no CUDA"):
            Trainer(Config.from_dict({**TINY, "device": "cuda"}))
    spec = EnvSpec(
        env_id="Small-v0",
        obs={"obs": ArraySpec(shape=(20, 20, 3), dtype="uint8")},
        action_nvec=(2,),
        discrete=True,
        headline="return",
        headline_max=None,
        max_episode_steps=None,
    )
    with pytest.raises(ConfigError, match=r"^env.id: 'Small-v0': .* too small for the CNN"):
        build_agent(tiny(), spec, torch.device("cpu"))
