"""Disturbed states: who gets whose, and what noise depends on."""

from itertools import product

import numpy as np
import torch

from ppo_tbptt.evaluation.perturbations import AddNoise, EpisodeKey, Measure, Shuffle


def rows(number: int) -> torch.Tensor:
    """States that tell whose they are."""
    return torch.arange(number, dtype=torch.float32)[:, None].repeat(1, 3)


def shuffled(episodes: list[EpisodeKey | None], age: list[int], seed: int = 0) -> list[int]:
    state = Shuffle(seed)(rows(len(age)), np.array(age), episodes)
    assert bool((state == state[:, :1]).all())  # whole rows
    return state[:, 0].int().tolist()


def test_every_running_episode_gets_another_levels_state() -> None:
    episodes: list[EpisodeKey | None] = list(product(range(5), range(3)))
    disturb = Shuffle(0)
    seen = set()
    for _ in range(50):
        source = disturb(rows(15), np.full(15, 4), episodes)[:, 0].int().tolist()
        assert sorted(source) == list(range(15))
        assert all(a // 3 != b // 3 for a, b in enumerate(source))
        seen.add(source[0])
    assert len(seen) > 8  # of the 12 of other levels
    assert shuffled(episodes, [4] * 15) == shuffled(episodes, [4] * 15) != shuffled(episodes, [4] * 15, seed=1)


def test_idle_and_starting_environments_take_no_part() -> None:
    source = shuffled([(0, 0), (1, 0), None, (2, 0), (3, 0)], [3, 5, 9, 0, 1])
    assert source[2:4] == [2, 3]
    assert sorted(source) == [0, 1, 2, 3, 4]
    assert all(source[i] != i for i in (0, 1, 4))


def test_a_single_level_keeps_its_own_states() -> None:
    assert shuffled([(7, 0), (7, 1), None], [2, 2, 2]) == [0, 1, 2]
    assert shuffled([None, None], [2, 2]) == [0, 1]
    # Two of three are of level 7: they can't both get the third's, but no row keeps its own.
    assert all(a != b for a, b in enumerate(shuffled([(7, 0), (7, 1), (8, 0)], [2, 2, 2])))


def test_noise_belongs_to_the_episode() -> None:
    """Whatever environment plays it, beside whatever others; not to its first step, and not to idle ones."""
    deviation = torch.tensor([0.0, 0.5, 2.0])

    def play(episodes: list[EpisodeKey | None], steps: int, seed: int = 0) -> np.ndarray:
        disturb = AddNoise(deviation, seed)
        zeros = torch.zeros(len(episodes), 3)
        return np.stack([disturb(zeros, np.full(len(episodes), age), episodes).numpy() for age in range(steps)])

    many = play([(5, 0), None, (5, 1), (6, 0)], 400)
    assert not many[0].any() and not many[:, 1].any()
    np.testing.assert_array_equal(many[:, 3], play([(6, 0)], 400)[:, 0])
    assert (many[1:, 0, 1:] != many[1:, 2, 1:]).all()
    assert (many[1:, 0, 1:] != play([(5, 0)], 400, seed=1)[1:, 0, 1:]).all()
    np.testing.assert_allclose(many[1:, 3].std(0), deviation, rtol=0.15)


def test_the_scale_is_of_what_is_carried_on() -> None:
    measure = Measure()
    state = torch.tensor([[3.0, 1.0], [100.0, 100.0], [5.0, 1.0], [100.0, 100.0]])
    assert measure(state, np.array([1, 0, 1, 4]), [(0, 0), (1, 0), (2, 0), None]) is state
    measure(torch.tensor([[4.0, -1.0]] * 4), np.array([2, 0, 2, 5]), [(0, 0), (1, 0), None, None])
    torch.testing.assert_close(measure.rms, torch.tensor([(50 / 3) ** 0.5, 1.0]))
