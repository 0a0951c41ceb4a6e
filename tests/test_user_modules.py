"""A core and a loss from a module of the user's own, from the config to an evaluation of the trained agent."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from configs_for_tests import TINY
from helpers import train
from test_resume import assert_equal_runs

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.contract import check_core
from ppo_tbptt.training.trainer import Trainer

MODULE = '''
from dataclasses import dataclass

import torch
from torch import nn

from ppo_tbptt.models import Core


class Leaky(Core):
    """A leaky integrator of a projection."""

    @dataclass
    class Config:
        width: int
        tau: float = 2.0

        def __post_init__(self):
            if self.tau < 1:
                raise ValueError("tau must be at least 1")

    def __init__(self, input_size, config):
        super().__init__()
        self.state_size = self.output_size = config.width
        self.project = nn.Linear(input_size, config.width)
        self.tau = config.tau

    def forward(self, x, state):
        outputs = []
        for x_t in self.project(x):
            state = state + (x_t - state) / self.tau
            outputs.append(state)
        return torch.stack(outputs), state


class Decoder(nn.Module):
    """Reconstructs what is seen from what is remembered."""

    def __init__(self, agent):
        super().__init__()
        self.linear = nn.Linear(agent.core.output_size, agent.encoder.output_size)

    def forward(self, batch, output):
        return (self.linear(output.core_output) - output.features.detach()).square().mean(), {}
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "users_own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return import_module("users_own")


def config(core: dict[str, Any], losses: dict[str, float] | None = None) -> Config:
    return Config.from_dict({**TINY, "core": core, "losses": losses or {}})


def test_train_checkpoint_resume_and_evaluate(module: Any, tmp_path: Path) -> None:
    check_core(module.Leaky, module.Leaky.Config(width=6, tau=3.0))
    settings = config({"kind": "users_own:Leaky", "width": 6, "tau": 3.0}, {"users_own:Decoder": 0.5})
    assert all("loss/Decoder" in row for row in train(settings, tmp_path / "whole"))
    with Trainer(settings, tmp_path / "parts") as trainer:
        next(trainer)
        trainer.save()
    with Trainer.resume(tmp_path / "parts") as trainer:
        list(trainer)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    policy = Policy.load(tmp_path / "parts")
    assert policy.agent.core.tau == 3.0
    assert not any("Decoder" in name for name in policy.agent.state_dict())
    outcome = evaluate(policy.agent, settings.env, seeds=range(200_000, 200_003), repeats=1, num_workers=0)
    assert len(outcome.per_episode) == 3


def test_what_cannot_be_built_is_one_line_before_anything_is_written(module: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^core\.kind: .*ValueError: tau must be at least 1") as caught:
        Trainer(config({"kind": "users_own:Leaky", "width": 6, "tau": 0.5}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
