"""A run that is interrupted and resumed gives the numbers of one that never was, bit for bit."""

import time
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from configs_for_tests import tiny

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer

SMALL: dict[str, Any] = {"hidden_size": 16, "cnn_channels": [4, 4, 4]}
CONFIGS = {
    "toy": tiny(
        core={"dropout": 0.2, "num_layers": 2},
        ppo={"learning_rate": {"initial": 1e-3, "final": 0.0}},
        train={"checkpoint_every": 1, "eval_every": 2},
    ),
    "toy in workers": tiny(env={"num_workers": 2}, train={"checkpoint_every": 1, "keep_checkpoints": 9}),
    "halves": tiny(env={"num_envs": 5, "num_workers": 2, "double_buffering": "on"}, train={"checkpoint_every": 1}),
    "frames": tiny(
        env={"id": "MortarMayhem-Grid-v0", "num_workers": 2},
        model=SMALL,
        train={"checkpoint_every": 1},
        total_steps=192,
    ),
    "endless": tiny(
        env={"id": "Endless-MortarMayhem-v0", "num_workers": 1},
        model=SMALL,
        train={"checkpoint_every": 1},
        total_steps=192,
    ),
}


def timeless(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


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


@pytest.mark.parametrize("name", CONFIGS)
def test_interrupted_at_every_iteration(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    with Trainer(config, tmp_path / "whole") as trainer:
        iterations = len(list(trainer))
    with Trainer(config, tmp_path / "parts") as trainer:
        next(trainer)
    for _ in range(iterations - 1):
        with Trainer.resume(tmp_path / "parts") as trainer:
            assert trainer.notes == []
            next(trainer)
    assert_same(results(tmp_path / "whole"), results(tmp_path / "parts"))


def test_killed_in_the_middle_of_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an iteration is lost, and what was written after the checkpoint goes."""
    config = tiny(train={"checkpoint_every": 2}, total_steps=384)
    with Trainer(config, tmp_path / "whole") as trainer:
        list(trainer)
    with Trainer(config, tmp_path / "parts") as trainer:
        for _ in range(3):  # the third is in the metrics and in no checkpoint
            next(trainer)
        with monkeypatch.context() as patch:
            patch.setattr(trainer.learner, "update", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(trainer)
    with Trainer.resume(tmp_path / "parts") as trainer:
        assert trainer.iteration == 2
        list(trainer)
    assert_same(results(tmp_path / "whole"), results(tmp_path / "parts"))


def test_dropped_in_the_middle_of_an_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(train={"checkpoint_every": 50})
    with Trainer(config, tmp_path / "whole") as trainer:
        list(trainer)
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
    assert_same(results(tmp_path / "whole"), results(tmp_path / "parts"))


def test_an_iteration_that_is_nearly_done_is_not_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one takes half a second, so that much is expected of the second."""
    monkeypatch.setattr("ppo_tbptt.training.callbacks.FINISH_SECONDS", 0.25)
    may_drop: list[bool] = []
    with Trainer(tiny(), tmp_path / "run") as trainer:
        update = trainer.learner.update

        def slow(*args: Any, **hooks: Any) -> Any:
            may_drop.append(trainer.snapshot.may_drop())
            time.sleep(0.5)
            may_drop.append(trainer.snapshot.may_drop())
            return update(*args, **hooks)

        monkeypatch.setattr(trainer.learner, "update", slow)
        next(trainer)
        next(trainer)
    assert may_drop == [True, True, True, False]  # nothing is known about the first


def test_an_evaluation_counts_as_a_part_of_its_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_tbptt.training.callbacks.FINISH_SECONDS", 0.25)
    may_drop: list[bool] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr("ppo_tbptt.training.callbacks.evaluate", slow)
    with Trainer(tiny(train={"eval_every": 2}), tmp_path / "run") as trainer:
        update = trainer.learner.update

        def watched(*args: Any, **hooks: Any) -> Any:
            may_drop.append(trainer.snapshot.may_drop())
            return update(*args, **hooks)

        monkeypatch.setattr(trainer.learner, "update", watched)
        list(trainer)
    assert may_drop == [True, True, False, True]  # nothing is known about the first iteration and evaluation


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
    config = CONFIGS["toy in workers"]
    with Trainer(config, tmp_path / "whole") as trainer:
        list(trainer)
    with Trainer(config, tmp_path / "parts") as trainer:
        next(trainer)
    with Trainer.resume(tmp_path / "parts", {"env.num_workers": 0}) as trainer:
        assert trainer.notes == ["changed: env.num_workers: 2 -> 0"]
        list(trainer)
    assert results(tmp_path / "whole")[0] == results(tmp_path / "parts")[0]


def test_a_damaged_newest_checkpoint_costs_only_the_time_since_the_one_before(tmp_path: Path) -> None:
    config = CONFIGS["toy"]
    with Trainer(config, tmp_path / "whole") as trainer:
        list(trainer)
    with Trainer(config, tmp_path / "parts") as trainer:
        for _ in range(3):
            next(trainer)
    newest = tmp_path / "parts" / "checkpoints" / "iteration_0000003.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"0000003\.pt.*0000002\.pt is used instead"):
        trainer = Trainer.resume(tmp_path / "parts")
    with trainer:
        assert trainer.iteration == 2
        list(trainer)
    assert_same(results(tmp_path / "whole"), results(tmp_path / "parts"))


def test_more_steps_go_on_with_the_schedules_as_they_were(tmp_path: Path) -> None:
    schedule = {"initial": 1e-3, "final": 0.0}
    with Trainer(tiny(ppo={"learning_rate": schedule}), tmp_path / "run") as trainer:
        list(trainer)
    with Trainer.resume(tmp_path / "run", {"total_steps": 384}) as trainer:
        assert "changed: total_steps: 256 -> 384" in trainer.notes
        rates = [report.scalars["optim/learning_rate"] for report in trainer]
    assert rates == [0.0, 0.0]
    with Trainer.resume(tmp_path / "run", {"total_steps": 512}) as trainer:
        list(trainer)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["optim/learning_rate"] for row in rows] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0, 0, 0, 0])


def test_what_cannot_change_is_refused_by_name(tmp_path: Path) -> None:
    with Trainer(tiny(total_steps=64), tmp_path / "run") as trainer:
        list(trainer)
    before = (tmp_path / "run" / "config.toml").read_bytes()
    for key, value in {"core.hidden_size": 16, "core.kind": "lstm", "model.hidden_size": 32}.items():
        with pytest.raises(ConfigError, match=rf"{key}: the run was started with .*{value}"):
            Trainer.resume(tmp_path / "run", {key: value, "total_steps": 128})
    with pytest.raises(ConfigError, match=r"env\.id"):
        Trainer.resume(tmp_path / "run", {"env.id": "MortarMayhem-Grid-v0"})
    assert (tmp_path / "run" / "config.toml").read_bytes() == before
    Trainer.resume(tmp_path / "run").close()


def test_an_environment_whose_spaces_changed_is_refused(tmp_path: Path) -> None:
    with Trainer(tiny(total_steps=64), tmp_path / "run") as trainer:
        list(trainer)
        tree = trainer.state_dict()
    tree["spec"]["action_nvec"] = [7]
    with pytest.raises(CheckpointError, match=r"action_nvec is .* now and was \(7,\)"):
        Trainer(Config.load(tmp_path / "run" / "config.toml"), restore=tree)


def test_what_is_not_exact_is_said(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(tiny(total_steps=512, env={"id": "ppo_tbptt/PocMemory-v0"}), run) as trainer:
        next(trainer)
        trainer.save()
    with Trainer.resume(run, {"env.num_envs": 6}) as trainer:
        assert any("not exact: all environments begin new episodes, because env.num_envs" in n for n in trainer.notes)
        next(trainer)
        trainer.save()
    with Trainer.resume(run, {"env.replay": False}) as trainer:
        assert any("because env.replay is, or was, false" in note for note in trainer.notes)
        next(trainer)


@pytest.mark.parametrize(("key", "value"), [("options.delay", 3), ("max_episode_steps", 50)])
def test_other_episodes_begin_anew(key: str, value: int, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(tiny(env={"id": "fixture_envs:fixture/ImageToy-v0"}, model=SMALL), run) as trainer:
        next(trainer)
        trainer.save()
    with Trainer.resume(run, {f"env.{key}": value}) as trainer:
        assert trainer.notes[-1] == (
            f"not exact: all environments begin new episodes, because env.{key.split('.')[0]} is another"
        )
        assert trainer.envs.spec.env_id == "fixture_envs:fixture/ImageToy-v0"
        next(trainer)


def test_environments_that_do_not_repeat_themselves_are_named(tmp_path: Path) -> None:
    """Of 16 environments 11 played levels that are others now: ten are named."""
    run = tmp_path / "run"
    config = tiny(env={"id": "test_resume:changing/Counter-v0", "num_envs": 16})
    with Trainer(config, run) as trainer:
        next(trainer)
        trainer.save()
        others = trainer.state_dict()["environments"][0]["seed"].tolist()[5:]
    Counter.others = others
    try:
        with Trainer.resume(run) as trainer:
            assert trainer.notes == [
                "not exact: 11 of 16 environments (number 5, 6, 7, 8, 9, 10, 11, 12, 13, 14) did not repeat their "
                "episodes when played again, and begin new ones"
            ]
    finally:
        Counter.others = []


class Counter(gym.Env[Any, Any]):
    """Endless; the observation is the step, or one more in the levels ``others``."""

    others: ClassVar[list[int]] = []
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space: gym.spaces.Space[Any] = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.t = float(seed in self.others)
        return np.array([self.t], np.float32), {}

    def step(self, action: int) -> Any:
        self.t += 1
        return np.array([self.t], np.float32), 0.0, False, False, {}


if "changing/Counter-v0" not in gym.registry:
    gym.register("changing/Counter-v0", entry_point=lambda **_: Counter(), disable_env_checker=True)


def test_progress_of_going_back_into_the_episodes_is_told(tmp_path: Path) -> None:
    with Trainer(tiny(train={"checkpoint_every": 1}), tmp_path / "run") as trainer:
        next(trainer)
    told: list[tuple[int, int]] = []
    Trainer.resume(tmp_path / "run", progress=lambda done, of: told.append((done, of))).close()
    assert told and told == sorted(told) and told[-1] == (4, 4)


def test_settings_of_the_optimiser_are_those_of_the_config(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Trainer(tiny(total_steps=64), run) as trainer:
        list(trainer)
    with Trainer.resume(run, {"total_steps": 128, "ppo.weight_decay": 0.5}) as trainer:
        assert "changed: ppo.weight_decay: 0.01 -> 0.5" in trainer.notes
        assert [group["weight_decay"] for group in trainer.learner.optimizer.param_groups] == [0.5]
