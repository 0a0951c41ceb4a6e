"""Stored states are computed anew with other weights, as if one had played with them from the rollout's first state."""

import pytest
import torch
from helpers import fake_rollout, small_agent, starts, tiny_agent
from test_frames import SHAPES, some_rollout
from torch import Tensor

from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.ppo import refresh
from ppo_tbptt.ppo.refresh import recomputed_states
from ppo_tbptt.types import Frames, Rollout


@torch.no_grad()
def states_of_plain_loops(agent: Agent, rollout: Rollout) -> Tensor:
    """Of each environment for itself, one step after the other."""
    out = torch.full_like(rollout.state.rows, torch.nan)
    for n in range(rollout.num_envs):
        state = rollout.state[0, n]
        for t in range(rollout.num_steps):
            out[t, n] = state = torch.zeros_like(state) if rollout.start[t, n] else state
            obs = {key: x.stacked() if isinstance(x, Frames) else x for key, x in rollout.obs.items()}
            state = agent.step({key: x[t, n][None] for key, x in obs.items()}, state[None]).state_out[0]
    return out


@pytest.mark.parametrize("core", CORES)
def test_with_the_weights_that_collected_them_states_are_those_that_are_stored(core: str) -> None:
    agent = small_agent(core, 2, 0.0 if core == "none" else 0.5)
    rollout = fake_rollout(agent, starts())
    agent.train()  # dropout acts in updates, never here
    torch.testing.assert_close(recomputed_states(agent, rollout).rows, rollout.state.rows)
    assert agent.training and agent.core.training


@pytest.mark.parametrize("num_frames", [5, 200])
def test_with_other_weights_they_are_those_of_plain_loops(num_frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of frames that repeat and others, projected a few at a time."""
    monkeypatch.setattr(refresh, "BLOCK", 8)
    torch.set_default_dtype(torch.float64)
    try:
        agent = tiny_agent(SHAPES, (3, 2), "lstm", 2)
        rollout = some_rollout(agent, num_frames)
        stored = rollout.state.rows.clone()
        agent.eval()
        wanted = states_of_plain_loops(agent, rollout)
        torch.testing.assert_close(recomputed_states(agent, rollout)[:], wanted, rtol=0, atol=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rollout.state.rows, stored) and (wanted[1:] - stored[1:]).abs().max() > 0.1
    assert not agent.training
