"""LevelSeeds: uniform, reproducible, and a function of (seed, environment, count) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.envs import LevelSeeds


@given(seed=st.integers(0, 2**64), num_envs=st.integers(1, 5), order=st.lists(st.integers(0, 4), max_size=60))
def test_order_and_number_of_environments_do_not_matter(seed: int, num_envs: int, order: list[int]) -> None:
    levels = LevelSeeds(seed, num_envs, 100, 1000)
    drawn: list[list[int]] = [[] for _ in range(num_envs)]
    for env in order:
        if env < num_envs:
            ahead = levels.peek(env)
            drawn[env].append(levels.begin(env))
            assert drawn[env][-1] == ahead
    wide, part = LevelSeeds(seed, 7, 100, 1000), LevelSeeds(seed, 1, 100, 1000, first_env=num_envs - 1)
    assert [[wide.begin(env) for _ in ours] for env, ours in enumerate(drawn)] == drawn
    assert [part.begin(0) for _ in drawn[-1]] == drawn[-1]
    restored = LevelSeeds(seed, num_envs, 100, 1000)
    restored.load_state_dict(levels.state_dict())
    assert [restored.peek(env) for env in range(num_envs)] == [levels.peek(env) for env in range(num_envs)]
    assert restored.state_dict() == levels.state_dict() == {"counts": [len(ours) for ours in drawn]}


def test_uniform_over_the_range_and_different_between_environments_and_seeds() -> None:
    streams = []
    for seed in (0, 1):
        levels = LevelSeeds(seed, 2, 50, 10)
        streams += [[levels.begin(env) for _ in range(500)] for env in (0, 1)]
    for drawn in streams:
        assert min(drawn) == 50 and max(drawn) == 59
        counts = np.bincount(np.array(drawn) - 50, minlength=10)
        assert ((counts - 50) ** 2 / 50).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    for place, one in enumerate(streams):
        for other in streams[:place]:
            assert 20 < sum(a == b for a, b in zip(one, other, strict=True)) < 85  # 50 expected if independent


def test_refused_states() -> None:
    levels = LevelSeeds(0, 2, 0, 5)
    for counts in ([1], [1, -1]):
        with pytest.raises(ValueError, match="expected 2 counts"):
            levels.load_state_dict({"counts": counts})
