"""GAE against the definition, and the infinite horizon."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.ppo.advantages import gae


@given(st.integers(1, 40), st.integers(1, 3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_equals_the_definition(steps: int, envs: int, gamma: float, gae_lambda: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    reward, value, next_value = (torch.randn(steps, envs, generator=g) for _ in range(3))
    end = torch.rand(steps, envs, generator=g) < 0.2
    ours = gae(reward, value, next_value, end, gamma=gamma, gae_lambda=gae_lambda)
    for n in range(envs):
        following = 0.0
        for t in reversed(range(steps)):
            delta = float(reward[t, n] + gamma * next_value[t, n] - value[t, n])
            following = delta + (0.0 if end[t, n] else gamma * gae_lambda * following)
            assert float(ours[t, n]) == pytest.approx(following, abs=2e-5, rel=1e-5)


def test_constant_reward_for_ever() -> None:
    """With lambda = 1 and V = 1 / (1 - gamma) at every cut, returns are 1 / (1 - gamma): nothing is lost at the cut."""
    gamma = 0.9
    value = torch.full((25, 2), 1 / (1 - gamma))
    end = torch.zeros(25, 2, dtype=torch.bool)
    end[9::10] = True  # truncations: next_value bootstraps across them
    advantage = gae(torch.ones(25, 2), value, value, end, gamma=gamma, gae_lambda=1.0)
    torch.testing.assert_close(advantage + value, value)
