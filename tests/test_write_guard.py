"""A disk that is full for a while."""

import pytest

from ppo_tbptt.run.sinks import UnwritableError, WriteGuard


def full() -> None:
    raise OSError(28, "No space left on device", "x")


def test_a_failing_write_is_noted_once_and_so_is_its_recovery() -> None:
    now = 0.0
    guard = WriteGuard(30, clock=lambda: now)
    for _ in range(3):
        assert not guard.try_write("metrics", full)
        now += 60
    assert len(guard.notes) == 1
    assert "metrics" in guard.notes[0] and "No space left" in guard.notes[0] and "30 minutes" in guard.notes[0]
    assert guard.try_write("metrics", lambda: None)
    assert guard.notes[1:] == ["metrics could be written again"]
    now += 10_000
    assert not guard.try_write("metrics", full), "its time begins anew"


def test_it_raises_when_the_minutes_are_over() -> None:
    now = 0.0
    guard = WriteGuard(30, clock=lambda: now)
    assert not guard.try_write("checkpoints", full)
    now = 29 * 60
    assert not guard.try_write("checkpoints", full)
    now = 30 * 60
    with pytest.raises(UnwritableError, match=r"could not write checkpoints for 30 minutes.*No space"):
        guard.try_write("checkpoints", full)
