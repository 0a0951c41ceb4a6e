"""What can be added to a training: callbacks, environments and agents of one's own."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from test_resume import results, timeless

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
    """It is called around epochs and after iterations; its scalars are in the metrics, its state in checkpoints."""
    config = tiny(train={"checkpoint_every": 1})
    with Trainer(config, tmp_path / "run", callbacks=[first := Count()]) as trainer:
        next(trainer)
    epochs = [f"1 {when} epoch {epoch}" for epoch in range(2) for when in ("before", "after")]
    assert first.calls == [*epochs, "1 done at 64"]
    with Trainer.resume(tmp_path / "run", callbacks=[Count()]) as trainer:
        list(trainer)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["memory/epochs"] for row in rows] == [2, 4, 6, 8]


def test_callbacks_change_no_number(tmp_path: Path) -> None:
    rows = []
    for callbacks in ([], [Count()]):
        with Trainer(tiny(), tmp_path / str(len(rows)), callbacks=callbacks) as trainer:
            rows.append([timeless(report.scalars) for report in trainer])
    assert rows[0] == [{tag: x for tag, x in row.items() if tag != "memory/epochs"} for row in rows[1]]


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
    """Those of torch, NumPy and Python draw what they would have drawn without it."""

    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    expected = draw()
    seed()
    with Trainer(tiny(core={"num_layers": 2, "dropout": 0.5})) as trainer:
        rows = [timeless(report.scalars) for report in trainer]
        drawn = draw()
    assert drawn[:2] == expected[:2]  # what checks types in the tests draws from Python's own
    with Trainer(tiny(core={"num_layers": 2, "dropout": 0.5})) as trainer:
        again = []
        for report in trainer:
            again.append(timeless(report.scalars))
            draw()
    assert again == rows


def test_checkpoints_of_format_2_are_resumed(tmp_path: Path) -> None:
    """The run was stopped after two of four iterations by an earlier version."""
    run = tmp_path / "run"
    shutil.copytree(DATA / "run_of_format_2", run)
    config = Config.load(run / "config.toml")
    with Trainer(config, tmp_path / "whole") as trainer:
        list(trainer)
    with Trainer.resume(run) as trainer:
        assert trainer.notes == []
        assert trainer.iteration == 2
        list(trainer)
    for row, wanted in zip(results(run)[0], results(tmp_path / "whole")[0], strict=True):
        assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)  # that version rounded otherwise
