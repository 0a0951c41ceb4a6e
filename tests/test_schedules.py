import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.config import Schedule


def value(initial: float, final: float, power: float, over: int, step: int) -> float:
    return Schedule(initial=initial, final=final, power=power, over_steps=over).at(step, total_steps=over)


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [
        (0, 1.0, 1.0),
        (25, 1.0, 0.8),  # a quarter of the way from 1.0 to 0.2
        (50, 2.0, 0.4),  # 0.2 + 0.8 * 0.5**2
        (75, 0.5, 0.6),  # 0.2 + 0.8 * 0.25**0.5
        (100, 1.0, 0.2),
        (10_000, 1.0, 0.2),
    ],
)
def test_polynomial_decay_by_hand(step: int, power: float, expected: float) -> None:
    assert value(1.0, 0.2, power, 100, step) == pytest.approx(expected, rel=1e-12)


@given(
    initial=st.floats(0, 1e3),
    final=st.floats(0, 1e3),
    power=st.floats(0.01, 10),
    over=st.integers(1, 10**9),
    step=st.integers(0, 2 * 10**9),
)
def test_stays_between_its_ends_and_moves_one_way(
    initial: float, final: float, power: float, over: int, step: int
) -> None:
    low, high = min(initial, final), max(initial, final)
    now, later = (value(initial, final, power, over, s) for s in (step, step + 1))
    slack = 1e-12 * high
    assert low - slack <= now <= high + slack
    assert abs(later - final) <= abs(now - final) + slack
    if step >= over:
        assert now == final
