"""The learnt initial state: where it acts, where its gradient comes from, and where it is kept."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import base, error_of, tiny
from helpers import NVEC, VECTOR, fake_rollout, fake_targets, naive_unroll, starts, train_tiny
from test_gradients import cuts, gradients, worst_relative
from torch import nn

from ppo_tbptt.cli import main
from ppo_tbptt.config import Config, CoreConfig, ModelConfig, PPOConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.models.contract import check_core
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.run.weights import load_weights, save_weights
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.trainer import Trainer

KINDS = [kind for kind in CORES if kind != "none"]
LEARNT = tiny(core={"initial_state": "learnt"}, train={"checkpoint_every": 1})


def learnt_agent(kind: Any, num_layers: int = 2) -> Agent:
    """One that begins episodes with something else than zeros."""
    torch.manual_seed(0)
    core = CoreConfig(kind=kind, hidden_size=8, num_layers=num_layers, initial_state="learnt")
    agent = Agent(VECTOR, NVEC, core=core, model=ModelConfig(hidden_size=16, vector_hidden_sizes=(8,)))
    with torch.no_grad():
        learnt_state(agent).normal_(0, 0.5)
    return agent


def learnt_state(agent: Agent) -> nn.Parameter:
    assert agent.core.learnt_state is not None
    return agent.core.learnt_state


def learner(agent: Agent, **config: Any) -> Learner:
    return Learner(agent, PPOConfig(**config), total_steps=1000, generator=torch.Generator())


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_as_zeros_and_keeps_the_contract_of_cores(kind: Any) -> None:
    config = CoreConfig(kind=kind, hidden_size=8, num_layers=2, initial_state="learnt")
    core = CORES[kind](6, config)
    assert torch.equal(core.initial_state(3), torch.zeros(3, core.state_size))
    check_core(CORES[kind], config)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_naive_unroll_which_begins_episodes_with_the_parameter_itself(kind: str) -> None:
    """Not with what was stored: the parameter has changed since the rollout."""
    agent = learnt_agent(kind)
    rollout = fake_rollout(agent, starts())
    with torch.no_grad():
        learnt_state(agent).add_(0.3)
    agent.train()
    own = learner(agent)
    sequences = cut(rollout.start, 5)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    assert 0 < int(batch.start.sum()) < len(batch.start)
    loss, _ = own.loss(batch, own.ppo_loss(0))
    # Elsewhere the stored state is fed: only sequences at an episode's start differ from a naive unroll of the rollout.
    naive = rollout_of_sequences(agent, rollout)
    expected, _ = own.ppo_loss(0)(*naive)
    torch.testing.assert_close(loss, expected)
    ours, theirs = gradients(agent, loss), gradients(agent, expected)
    assert worst_relative(ours, theirs) < 1e-4
    by_name = dict(zip([name for name, _ in agent.named_parameters()], ours, strict=True))
    assert float(by_name["core.learnt_state"].abs().max()) > 1e-4


def rollout_of_sequences(agent: Agent, rollout: Any) -> Any:
    """The naive unroll, with the stored state wherever a sequence begins without an episode."""
    begins = cuts(rollout.start, 5)

    class Restoring:
        """The agent, whose steps are fed what was stored where a sequence begins."""

        core = agent.core

        def __init__(self) -> None:
            order = [(t, n) for n in range(begins.shape[1]) for t in range(begins.shape[0])]
            self.steps = iter(order)

        def step(self, obs: Any, state: Any) -> Any:
            t, n = next(self.steps)
            if begins[t, n] and not rollout.start[t, n]:
                state = rollout.state[t, n : n + 1]
            return agent.step(obs, state)

    restoring: Any = Restoring()
    return naive_unroll(restoring, rollout, begins)


def test_acting_resets_to_it_and_the_trained_one_is_wherever_weights_are(tmp_path: Path) -> None:
    with Trainer(LEARNT, tmp_path / "run") as trainer:
        with torch.no_grad():
            learnt_state(trainer.agent).fill_(0.25)
        next(trainer)
        storage = trainer.storage
        assert storage.start[1:].any() and (storage.state[storage.start] == 0.25).all()
        assert not (storage.state[~storage.start] == 0.25).any()
        for _ in trainer:
            pass
        trained = learnt_state(trainer.agent).detach().clone()
    assert (trained - 0.25).abs().min() > 1e-4
    policy = Policy.load(tmp_path / "run")
    assert torch.equal(learnt_state(policy.agent), trained)

    policy.act(np.zeros((2, 3), np.float32))
    policy.reset(np.array([False, True]))
    assert np.array_equal(policy.state[1], trained.numpy()) and not np.array_equal(policy.state[0], trained.numpy())

    save_weights(tmp_path / "a.safetensors", policy.agent.state_dict(), policy.config, policy.spec, 7)
    assert torch.equal(load_weights(tmp_path / "a.safetensors")["agent"]["core.learnt_state"], trained)
    assert torch.equal(learnt_state(Policy.load(tmp_path / "a.safetensors").agent), trained)


def test_an_onnx_file_holds_it_and_the_printed_lines_begin_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    run, file = train_tiny(tmp_path / "run", total_steps=64, core={"initial_state": "learnt"}), tmp_path / "a.onnx"
    policy = Policy.load(run)
    capsys.readouterr()
    assert main(["export", str(run), "--onnx", str(file)]) == 0
    properties = {p.key: p.value for p in onnx.load(file).metadata_props}
    assert json.loads(properties["initial_state"]) == learnt_state(policy.agent).tolist()
    printed = [line[2:] for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in printed if re.match(r"(import|\w+(, \w+)* = )", line)]
    names: dict[str, Any] = {"obs": np.ones(3, np.float32)}
    exec("\n".join(lines), names)
    assert names["action"] == policy.act(names["obs"], greedy=True)
    np.testing.assert_allclose(names["state"][0], policy.state, atol=1e-5)


def test_it_does_not_decay_and_minibatches_without_a_start_count_as_gradients_of_zero() -> None:
    agent = learnt_agent("gru")
    rollout = fake_rollout(agent, torch.zeros(8, 3, dtype=torch.bool))
    before = learnt_state(agent).detach().clone()
    own = learner(agent, weight_decay=0.5, num_epochs=1, num_minibatches=2)
    own.update(rollout, fake_targets(rollout), 0, Timer())
    assert torch.equal(learnt_state(agent), before)
    moments = own.optimizer.state[learnt_state(agent)]
    assert float(moments["step"]) == 2 and not moments["exp_avg"].any()
    begun = fake_rollout(agent, torch.ones(8, 3, dtype=torch.bool))
    own.update(begun, fake_targets(begun), 0, Timer())
    moved = learnt_state(agent).detach().clone()
    assert not torch.equal(moved, before)
    own.update(rollout, fake_targets(rollout), 0, Timer())
    assert not torch.equal(learnt_state(agent), moved)  # by its momentum, as on ranks


def test_an_optimiser_state_that_lacks_a_parameter_is_gone_on_with() -> None:
    agent = learnt_agent("gru")
    rollout = fake_rollout(agent, starts())
    one, other = learner(agent), learner(deepcopy(agent))
    one.update(rollout, fake_targets(rollout), 0, Timer())
    tree = deepcopy(one.state_dict())
    ((number,), rest) = (group["params"] for group in tree["optimizer"]["param_groups"])
    assert sorted([number, *rest]) == list(range(len(one.parameters())))
    assert tree["optimizer"]["state"].pop(number)["exp_avg"].shape == learnt_state(agent).shape
    other.load_state_dict(tree)
    other.update(rollout, fake_targets(rollout), 0, Timer())
    steps = {name: float(other.optimizer.state[p]["step"]) for name, p in other.agent.named_parameters()}
    assert steps.pop("core.learnt_state") == 24 and set(steps.values()) == {48}


def test_with_zeros_there_is_neither_parameter_nor_group() -> None:
    with Trainer(tiny()) as trainer:
        next(trainer)
        tree = trainer.state_dict()
    assert not [name for name in tree["agent"] if "learnt" in name]
    assert len(tree["optimizer"]["param_groups"]) == 1


def test_without_memory_there_is_nothing_to_learn() -> None:
    message = error_of(Config.from_dict, base(core={"kind": "none", "initial_state": "learnt"}))
    assert all(word in message for word in ("core.initial_state: ", '"learnt"', '"none"', 'must be "zeros"'))
