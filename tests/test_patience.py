"""A disk that is full for a while."""

import pytest

from ppo_tbptt.run.sinks import Patience, UnwritableError


def full() -> None:
    raise OSError(28, "No space left on device", "x")


def test_says_so_once_goes_on_and_says_when_it_works_again() -> None:
    now = 0.0
    patience = Patience(30, clock=lambda: now)
    for _ in range(3):
        assert not patience.attempt("metrics", full)
        now += 60
    assert len(patience.notes) == 1
    assert "metrics" in patience.notes[0] and "No space left" in patience.notes[0] and "30 minutes" in patience.notes[0]
    assert patience.attempt("metrics", lambda: None)
    assert patience.notes[1:] == ["metrics could be written again"]
    now += 10_000
    assert not patience.attempt("metrics", full), "its time begins anew"


def test_its_end() -> None:
    now = 0.0
    patience = Patience(30, clock=lambda: now)
    assert not patience.attempt("checkpoints", full)
    now = 29 * 60
    assert not patience.attempt("checkpoints", full)
    now = 30 * 60
    with pytest.raises(UnwritableError, match=r"could not write checkpoints for 30 minutes.*No space"):
        patience.attempt("checkpoints", full)
