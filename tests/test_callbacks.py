"""What can be added to a training: callbacks, environments and agents of one's own."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import timeless, train
from test_resume import results

from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.trainer import Trainer

DATA = Path(__file__).parent / "data"


class Count(Callback):
    """Counts its calls, and keeps the count in checkpoints."""

    name = "count"

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.epochs = 0

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        self.calls.append(f"{iteration.number} before epoch {epoch}")

    def after_epoch(self, iteration: Iteration, epoch: int) -> None:
        self.calls.append(f"{iteration.number} after epoch {epoch}")
        self.epochs += 1
        iteration.scalars["memory/epochs"] = float(self.epochs)
        gradient = next(iteration.trainer.agent.parameters()).grad
        assert gradient is not None and iteration.rollout.value.shape == iteration.targets.advantage.shape

    def after_iteration(self, iteration: Iteration) -> None:
        self.calls.append(f"{iteration.number} done at {iteration.env_steps}")
        run = iteration.trainer.run
        assert run is not None and read_metrics(run.metrics)[-1]["iteration"] == iteration.number  # written before

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


def test_a_callback_of_ones_own(tmp_path: Path) -> None:
    """It is called around epochs and after iterations; its scalars are in the metrics, its state in checkpoints.

    It changes no number besides.
    """
    config = tiny(train={"checkpoint_every": 1})
    with Trainer(config, tmp_path / "run", callbacks=[first := Count()]) as trainer:
        next(trainer)
    epochs = [f"1 {when} epoch {epoch}" for epoch in range(2) for when in ("before", "after")]
    assert first.calls == [*epochs, "1 done at 64"]
    with Trainer.resume(tmp_path / "run", callbacks=[Count()]) as trainer:
        list(trainer)
    rows = [timeless(row) for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert [row.pop("memory/epochs") for row in rows] == [2, 4, 6, 8]
    assert rows == train(config)


class MayDrop(Callback):
    """Asks before each update whether the iteration may be dropped."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        if not epoch:
            self.answers.append(iteration.trainer.snapshot.may_drop())


@pytest.mark.parametrize(
    ("eval_every", "answers"),
    [(0, [True, False, False, False]), (3, [True, False, True, False]), (2, [True, True, False, False])],
)
def test_iterations_of_unknown_duration_may_be_dropped(eval_every: int, answers: list[bool], tmp_path: Path) -> None:
    """Of those with an evaluation, and of those without, only the first of a run that writes what is needed for it."""
    config = tiny(train={"eval_every": eval_every, "eval_num_seeds": 1, "eval_repeats": 1})
    with Trainer(config, tmp_path / "run", callbacks=[asks := MayDrop()]) as trainer:
        assert not trainer.snapshot.may_drop()
        list(trainer)
    assert asks.answers == answers
    with Trainer(config, callbacks=[asks := MayDrop()]) as trainer:
        list(trainer)
    assert not any(asks.answers)


def test_an_agent_that_is_handed_in(tmp_path: Path) -> None:
    """It trains, and what a config cannot rebuild is said in one line where it is missing."""
    config = tiny(train={"checkpoint_every": 1})
    with Trainer(config) as trainer:
        agent = build_agent(config.replace(core={"hidden_size": 5}), trainer.envs.spec, torch.device("cpu"))
    before = [p.clone() for p in agent.parameters()]
    with Trainer(config, tmp_path / "run", agent=agent) as trainer:
        next(trainer)
        assert trainer.agent is agent
    assert any(not torch.equal(p, q) for p, q in zip(before, agent.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"its agent was handed in .* resume with agent=") as caught:
        Trainer.resume(tmp_path / "run")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"its agent was handed in .* no config describes it") as caught:
        Policy.load(tmp_path / "run")
    assert "\n" not in str(caught.value)
    with Trainer.resume(tmp_path / "run", agent=agent) as trainer:
        assert len(list(trainer)) == 3


def test_a_training_leaves_the_global_generators_alone() -> None:
    """Neither does it draw from torch's and NumPy's, nor does it matter what others draw from them and Python's."""
    config = tiny(core={"num_layers": 2, "dropout": 0.5})
    before = torch.get_rng_state(), str(np.random.get_state())
    rows = train(config)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    with Trainer(config) as trainer:
        for report, row in zip(trainer, rows, strict=True):
            assert timeless(report.row()) == row
            torch.rand(3)
            np.random.rand(3)
            random.random()


def test_checkpoints_of_format_2_are_resumed(tmp_path: Path) -> None:
    """The run was stopped after two of four iterations by an earlier version."""
    run = tmp_path / "run"
    shutil.copytree(DATA / "run_of_format_2", run)
    train(Config.load(run / "config.toml"), tmp_path / "whole")
    with Trainer.resume(run) as trainer:
        assert trainer.notes == []
        assert trainer.iteration == 2
        list(trainer)
    for row, wanted in zip(results(run)[0], results(tmp_path / "whole")[0], strict=True):
        assert wanted.keys() - row.keys() <= {"sequences/cut_fraction"}  # newer than the version
        assert row == pytest.approx({tag: wanted[tag] for tag in row}, rel=1e-4, abs=1e-6)  # which rounded otherwise
