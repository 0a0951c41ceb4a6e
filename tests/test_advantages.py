"""GAE against the definition."""

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
