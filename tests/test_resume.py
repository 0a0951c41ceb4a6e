"""A run that is interrupted and resumed gives the numbers of one that never was, bit for bit."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from fixture_envs import tracer_length
from helpers import timeless, train, train_tiny

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer

SMALL: dict[str, Any] = {"hidden_size": 16, "cnn_channels": [4, 4, 4], "normalize_frames": True}
CONFIGS = {
    "toy": tiny(
        core={"kind": "ln_lstm", "dropout": 0.2, "num_layers": 2, "chrono_steps": 20},
        ppo={"learning_rate": {"initial": 1e-3, "final": 0.0}},
        train={"checkpoint_every": 1, "eval_every": 2},
    ),
    "overlapping": tiny(
        ppo={"sequence_length": 5, "sequence_stride": 2, "burn_in": 3, "refresh_every": 1, "num_epochs": 3},
        train={"checkpoint_every": 1},
    ),
    "halves": tiny(env={"num_envs": 5, "num_workers": 2, "double_buffering": "on"}, train={"checkpoint_every": 1}),
    "control of gradients": tiny(
        core={"kind": "ln_gru", "dropout": 0.2, "num_layers": 2, "initial_state": "learnt", "execution": "padded"}
        | {"residual": True, "norm": True},
        ppo={"grad_clip": "per_layer", "jacobian_norm_coef": 0.1},
        train={"checkpoint_every": 1},
    ),
    "frames": tiny(
        env={"id": "MortarMayhem-Grid-v0", "num_workers": 2},
        model=SMALL,
        train={"checkpoint_every": 1},
        total_steps=192,
    ),
}
CONFIGS["endless"] = CONFIGS["frames"].replace(env={"id": "Endless-MortarMayhem-v0", "num_workers": 1})


def results(run: Path) -> tuple[list[dict[str, float]], dict[str, Any], Any]:
    """Metrics without the clock, the last checkpoint, and the best one's."""
    rows = [timeless(row) for row in read_metrics(run / "metrics.jsonl")]
    best = run / "checkpoints" / "best.pt"
    return rows, load_checkpoint(RunDir(run).newest()), load_checkpoint(best) if best.exists() else None


def assert_same(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"python"}:  # that generator is what the tests' type checker picks its samples with
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def assert_equal_runs(whole: Path, parts: Path) -> None:
    assert_same(results(whole), results(parts))


@pytest.mark.parametrize("name", CONFIGS)
def test_interrupted_at_every_iteration(name: str, tmp_path: Path) -> None:
    iterations = len(train(CONFIGS[name], tmp_path / "whole"))
    with Trainer(CONFIGS[name], tmp_path / "parts") as trainer:
        next(trainer)
    for _ in range(iterations - 1):
        with Trainer.resume(tmp_path / "parts") as trainer:
            assert trainer.notes == []
            next(trainer)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_damaged_newest_checkpoint_costs_only_the_time_since_the_one_before(tmp_path: Path) -> None:
    train(CONFIGS["toy"], tmp_path / "whole")
    with Trainer(CONFIGS["toy"], tmp_path / "parts") as trainer:
        for _ in range(3):
            next(trainer)
    newest = tmp_path / "parts" / "checkpoints" / "iteration_0000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"0000003\.pt.*0000002\.pt is used instead"):
        trainer = Trainer.resume(tmp_path / "parts")
    with trainer:
        list(trainer)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_dropped_in_the_middle_of_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train={"checkpoint_every": 50})
    train(config, tmp_path / "whole")
    monkeypatch.setattr("ppo_tbptt.training.callbacks.FINISH_SECONDS", -1.0)
    with Trainer(config, tmp_path / "parts") as trainer:
        next(trainer)
        assert not trainer.snapshot.may_drop(), "between iterations there is nothing to drop"
        with monkeypatch.context() as patch:
            update = trainer.learner.update
            patch.setattr(trainer.learner, "update", lambda *args, **hooks: (update(*args, **hooks), 1 / 0))
            with pytest.raises(ZeroDivisionError):
                next(trainer)
        assert trainer.snapshot.may_drop()
        path = trainer.snapshot.save(trainer)
    assert path is not None and path.name == "iteration_0000001.pt"
    with Trainer.resume(tmp_path / "parts") as trainer:
        list(trainer)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")


def test_an_iteration_that_is_nearly_done_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates and evaluations take half a second each, so that much is expected of later ones."""
    monkeypatch.setattr("ppo_tbptt.training.callbacks.FINISH_SECONDS", 0.25)
    may_drop: list[bool] = []

    def slow_evaluation(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("ppo_tbptt.training.callbacks.evaluate", slow_evaluation)
    with Trainer(tiny(train={"eval_every": 2}), tmp_path / "run") as trainer:
        update = trainer.learner.update

        def slow_update(*args: Any, **hooks: Any) -> Any:
            may_drop.append(trainer.snapshot.may_drop())
            time.sleep(0.5)
            may_drop.append(trainer.snapshot.may_drop())
            return update(*args, **hooks)

        monkeypatch.setattr(trainer.learner, "update", slow_update)
        list(trainer)
    # Nothing is known about the first iteration without an evaluation, and the first with one.
    assert may_drop == [True, True, True, True, True, False, True, True]


def test_what_is_saved_is_not_saved_again(tmp_path: Path) -> None:
    with Trainer(tiny(train={"checkpoint_every": 50}), tmp_path / "run") as trainer:
        next(trainer)
        path = trainer.save()
        assert path is not None and path == tmp_path / "run" / "checkpoints" / "iteration_0000001.pt"
        path.write_bytes(b"as it was")
        assert trainer.save() == path and path.read_bytes() == b"as it was"
    with Trainer(tiny()) as trainer:
        next(trainer)
        assert trainer.save() is None


def test_another_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    whole = train(CONFIGS["frames"])
    with Trainer(CONFIGS["frames"], tmp_path / "parts") as trainer:
        next(trainer)
    with Trainer.resume(tmp_path / "parts", {"env.num_workers": 0}) as trainer:
        assert trainer.notes == ["changed: env.num_workers: 2 -> 0"]
        assert [timeless(report.row()) for report in trainer] == whole[1:]


def test_more_steps_go_on_with_the_schedules_as_they_were_and_other_settings_as_they_are(tmp_path: Path) -> None:
    run = train_tiny(tmp_path / "run", ppo={"learning_rate": {"initial": 1e-3, "final": 0.0}})
    with Trainer.resume(run, {"total_steps": 384, "ppo.weight_decay": 0.5}) as trainer:
        assert {"changed: total_steps: 256 -> 384", "changed: ppo.weight_decay: 0.01 -> 0.5"} <= {*trainer.notes}
        assert [group["weight_decay"] for group in trainer.learner.optimizer.param_groups] == [0.5]
        list(trainer)
    with Trainer.resume(run, {"total_steps": 512}) as trainer:
        list(trainer)
    rates = [row["optim/learning_rate"] for row in read_metrics(run / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 0, 0, 0])


def test_what_cannot_change_is_refused_by_name(tmp_path: Path) -> None:
    run = train_tiny(tmp_path / "run", total_steps=64)
    before = (run / "config.toml").read_bytes()
    changes = {"core.hidden_size": 16, "core.kind": "lstm", "model.hidden_size": 32, "env.id": "MortarMayhem-Grid-v0"}
    for key, value in changes.items():
        with pytest.raises(ConfigError, match=rf"{key}: the run was started with .*{value}"):
            Trainer.resume(run, {key: value, "total_steps": 128})
    assert (run / "config.toml").read_bytes() == before
    with Trainer.resume(run) as trainer:
        tree = trainer.state_dict()
    tree["spec"]["action_nvec"] = [7]
    with pytest.raises(CheckpointError, match=r"action_nvec is .* now and was \(7,\)"):
        Trainer(Config.load(run / "config.toml"), restore=tree)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_envs", 6, "env.num_envs "),
        ("replay", False, "env.replay is, or was, false"),
        ("options.delay", 3, "env.options is another"),
        ("max_episode_steps", 50, "env.max_episode_steps is another"),
    ],
)
def test_what_is_not_exact_is_said(key: str, value: Any, reason: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(tiny(env={"id": "fixture_envs:fixture/ImageToy-v0"}, model=SMALL), run) as trainer:
        next(trainer)
        trainer.save()
    with Trainer.resume(run, {f"env.{key}": value}) as trainer:
        assert f"not exact: all environments begin new episodes, because {reason}" in trainer.notes[-1]
        assert trainer.state_dict()["level_seeds"] == [6] * 4 + [1] * (trainer.envs.num_envs - 4)
        next(trainer)


def test_environments_that_do_not_repeat_themselves_are_named(tmp_path: Path) -> None:
    """Tracers number their episodes from 0, so a later one looks different in a new instance: ten are named."""
    tracer = {"id": "fixture_envs:fixture/Tracer-v0", "options": {"min_length": 3, "max_length": 6}, "num_envs": 16}
    with Trainer(tiny(env=tracer, ppo={"rollout_steps": 5, "sequence_length": 5}), tmp_path / "run") as trainer:
        levels = trainer.state_dict()["environments"][0]["seed"].tolist()
        next(trainer)
        trainer.save()
    later = [number for number, level in enumerate(levels) if tracer_length(level, 3, 6) <= 5]
    assert 10 < len(later) < 16
    with Trainer.resume(tmp_path / "run") as trainer:
        assert trainer.notes == [
            f"not exact: {len(later)} of 16 environments (number {', '.join(map(str, later[:10]))}) did not repeat "
            "their episodes when played again, and begin new ones"
        ]


def test_progress_of_going_back_into_the_episodes_is_told(tmp_path: Path) -> None:
    with Trainer(tiny(train={"checkpoint_every": 1}), tmp_path / "run") as trainer:
        next(trainer)
    told: list[tuple[int, int]] = []
    Trainer.resume(tmp_path / "run", progress=lambda done, of: told.append((done, of))).close()
    assert told and told == sorted(told) and told[-1] == (4, 4)
