import pytest

from ppo_tbptt.config import Schedule


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [
        (0, 1.0, 1.0),
        (25, 1.0, 0.8),  # a quarter of the way from 1.0 to 0.2
        (50, 2.0, 0.4),  # 0.2 + 0.8 * 0.5**2
        (75, 0.5, 0.6),  # 0.2 + 0.8 * 0.25**0.5
    ],
)
def test_polynomial_decay_by_hand(step: int, power: float, expected: float) -> None:
    schedule = Schedule(initial=1.0, final=0.2, power=power)
    assert schedule.at(step, total_steps=100) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("step", [100, 101, 10_000])
def test_from_its_end_on_it_is_exactly_the_final_value(step: int) -> None:
    for power in (0.5, 1.0, 3.0):
        assert Schedule(initial=1.0, final=0.2, power=power, over_steps=100).at(step, total_steps=10**6) == 0.2
