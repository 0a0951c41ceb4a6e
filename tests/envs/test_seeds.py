"""LevelSeeds: uniform, reproducible, and a function of (seed, environment, count) alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.envs import LevelSeeds


def stream(seeds: LevelSeeds, index: int, count: int) -> list[int]:
    mask = np.arange(len(seeds.current)) == index
    drawn = []
    for _ in range(count):
        drawn.append(int(seeds.current[index]))
        seeds.advance(mask)
    return drawn


@given(
    seed=st.integers(0, 2**64),
    num_envs=st.integers(1, 5),
    masks=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), max_size=12),
)
def test_order_and_number_of_environments_do_not_matter(seed: int, num_envs: int, masks: list[list[bool]]) -> None:
    seeds = LevelSeeds(seed, num_envs, 100, 1000)
    drawn = [[int(first)] for first in seeds.current]
    for mask in masks:
        seeds.advance(np.array(mask[:num_envs]))
        for index in np.flatnonzero(mask[:num_envs]):
            drawn[index].append(int(seeds.current[index]))
    wide = LevelSeeds(seed, 7, 100, 1000)
    for index, ours in enumerate(drawn):
        assert stream(wide, index, len(ours)) == ours
    restored = LevelSeeds(seed, num_envs, 100, 1000)
    restored.load_state(seeds.state())
    assert restored.current.tolist() == seeds.current.tolist() and restored.state() == seeds.state()


def test_current_is_a_copy_of_int64() -> None:
    seeds = LevelSeeds(0, 3, 0, 10**9)
    before = seeds.current
    assert before.dtype == np.int64
    seeds.advance(np.array([True, False, True]))
    assert (before != seeds.current).tolist() == [True, False, True]
    seeds.current[:] = -5
    assert (seeds.current >= 0).all()


def test_uniform_over_the_range_and_different_between_environments_and_seeds() -> None:
    streams = [stream(LevelSeeds(seed, 2, 50, 10), index, 500) for seed in (0, 1) for index in (0, 1)]
    for drawn in streams:
        assert min(drawn) == 50 and max(drawn) == 59
        counts = np.bincount(np.array(drawn) - 50, minlength=10)
        assert ((counts - 50) ** 2 / 50).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001
    for place, one in enumerate(streams):
        for other in streams[:place]:
            assert 20 < sum(a == b for a, b in zip(one, other, strict=True)) < 85  # 50 expected if independent


def test_one_level() -> None:
    assert stream(LevelSeeds(3, 1, 7, 1), 0, 5) == [7] * 5


@pytest.mark.parametrize("arguments", [(-1, 1, 0, 1), (0, 0, 0, 1), (0, 1, -1, 1), (0, 1, 0, 0)])
def test_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        LevelSeeds(*arguments)


def test_refused_states_and_masks() -> None:
    seeds = LevelSeeds(0, 2, 0, 5)
    for state in ([1], [1, -1]):
        with pytest.raises(ValueError, match="expected 2 counts"):
            seeds.load_state(state)
    for mask in (np.array([0, 1]), np.array([True])):
        with pytest.raises(ValueError, match="bool"):
            seeds.advance(mask)
