import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.config import Schedule


def value(initial: float, final: float | None, power: float, over: int, step: int) -> float:
    span = None if final is None else over
    return Schedule(initial=initial, final=final, power=power, over_steps=span).at(step, total_steps=over)


@pytest.mark.parametrize(
    ("step", "power", "expected"),
    [
        (0, 1.0, 1.0),
        (25, 1.0, 0.8),  # a quarter of the way from 1.0 to 0.2
        (50, 1.0, 0.6),
        (50, 2.0, 0.4),  # 0.2 + 0.8 * 0.5**2
        (75, 0.5, 0.6),  # 0.2 + 0.8 * 0.25**0.5
        (100, 1.0, 0.2),
        (100, 3.0, 0.2),
        (10_000, 1.0, 0.2),
    ],
)
def test_polynomial_decay_by_hand(step: int, power: float, expected: float) -> None:
    assert value(1.0, 0.2, power, 100, step) == pytest.approx(expected, rel=1e-12)


def test_the_span_without_one_of_its_own_is_the_run() -> None:
    assert Schedule(initial=1.0, final=0.0).at(25, total_steps=100) == 0.75


@given(initial=st.floats(0, 1e9), over=st.integers(1, 10**15), step=st.integers(0, 10**15))
def test_constant_without_final(initial: float, over: int, step: int) -> None:
    assert value(initial, None, 1.0, over, step) == initial


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
