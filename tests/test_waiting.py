"""What a GPU needs and a CPU does not show: the host hardly ever waits, no operation mixes the two, and the like."""

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device_stand_in import DEVICE, OnDevice, StandIn, move
from helpers import tiny_agent, tracers

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.ppo.advantages import gae
from ppo_tbptt.ppo.collector import RolloutCollector, empty_rollout
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Carry, Rollout, Targets

STEPS, ENVS = 24, 5


@pytest.fixture(autouse=True)
def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Agent, "arithmetic", lambda self: nullcontext())  # which knows no such device
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *args, **kwargs: None)


def collect(agent: Agent, obs_device: torch.device, mode: StandIn, state_spacing: int) -> tuple[Rollout, Carry]:
    """Two rollouts, the second of which ``mode`` has seen; two halves, with terminations and truncations."""
    storage = empty_rollout(agent, STEPS, ENVS, state_spacing=state_spacing)
    if obs_device != DEVICE:
        storage.obs["obs"] = torch.zeros(STEPS, ENVS, 3)
    with tracers(ENVS, two_groups=True) as envs:
        collector = RolloutCollector(envs, agent)
        carry = collector.collect(collector.begin(), storage, torch.rand(STEPS, ENVS, 2), Timer()).carry
        mode.waits.clear()
        carry = collector.collect(carry, storage, torch.rand(STEPS, ENVS, 2), Timer()).carry
    return storage, carry


OVERLAPPING = {"sequence_stride": 2, "burn_in": 3, "refresh_every": 1}


@pytest.mark.parametrize(
    ("core", "obs_device", "options"),
    [*((core, "cpu", OVERLAPPING) for core in CORES), *((core, "meta", {}) for core in ("gru", "gated_delta"))],
)
def test_the_host_waits_for_each_action_and_twice_per_update(core: str, obs_device: str, options: Any) -> None:
    agent = tiny_agent({"obs": (3,)}, (3, 2), core)
    config = PPOConfig(num_epochs=3, num_minibatches=4, sequence_length=6, **options)
    with StandIn() as mode:
        move(agent)
        learner = Learner(agent, config, total_steps=1000, generator=torch.Generator())
        rollout, carry = collect(agent, torch.device(obs_device), mode, config.state_spacing)
        assert mode.waits == ["aten::_to_copy"] * 2 * STEPS  # the actions of each half
        assert all(isinstance(x, OnDevice) for x in (rollout.value, rollout.next_value, carry.state))
        assert rollout.terminated.any() and rollout.truncated.any()
        end = rollout.terminated | rollout.truncated
        advantage = gae(rollout.reward, rollout.value, rollout.next_value, end, gamma=0.99, gae_lambda=0.95)
        mode.waits.clear()
        stats = learner.update(
            rollout, Targets(advantage=advantage, value_target=advantage + rollout.value), 0, Timer()
        )
        assert stats.num_updates == 12 and stats.num_nonfinite == 0
        assert mode.waits == ["aten::_to_copy"] * 2  # where episodes start, at its beginning; the figures, at its end
        assert mode.mixed == [] and mode.not_deterministic == []
