"""Sequences partition the rollout, and minibatches the sequences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.ppo.sequences import cut, cut_fraction, split


@given(st.integers(1, 30), st.integers(1, 5), st.none() | st.integers(1, 35), st.data())
def test_cut_partitions_the_rollout(steps: int, envs: int, length: int | None, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=steps * envs, max_size=steps * envs))
    start = torch.tensor(bits).view(steps, envs)
    sequences = cut(start, length)
    index, mask = sequences.index, sequences.mask

    assert sorted(index[mask].tolist()) == list(range(steps * envs))  # every step exactly once
    assert torch.equal(mask, mask.cummin(0).values)  # padding only at the tail
    lengths = mask.sum(0)
    assert len(mask) == lengths.max()  # no longer than the longest sequence
    assert lengths.min() >= 1
    assert length is None or lengths.max() <= length
    for s in range(mask.shape[1]):
        t, n = index[: lengths[s], s] // envs, index[: lengths[s], s] % envs
        assert (n == n[0]).all()  # one environment
        assert torch.equal(t, t[0] + torch.arange(len(t)))  # consecutive
        assert not start[t[1:], n[1:]].any()  # never across a start
        begins = bool(t[0] == 0 or start[t[0], n[0]])
        assert begins or (length is not None and lengths.max() == length)  # cut elsewhere only by the length
        at_end = t[-1] == steps - 1 or start[t[-1] + 1, n[0]] if t[-1] < steps - 1 else True
        assert at_end or len(t) == length  # and never shorter than need be


def test_steps_whose_gradient_is_cut() -> None:
    """Of two environments: `a` began before the rollout, `b` and `c` in it; in capitals those that are cut."""
    start = torch.zeros(6, 2, dtype=torch.bool)
    start[2, 0] = start[0, 1] = True
    rows = {None: "AAbbbb cccccc", 3: "AAbbbB cccCCC", 1: "AAbBBB cCCCCC"}
    for length, steps in rows.items():
        assert float(cut_fraction(start, cut(start, length))) == pytest.approx(sum(map(str.isupper, steps)) / 12)
    counting = cut(start, 3)
    first = replace(counting, in_loss=counting.mask & (torch.arange(3)[:, None] == 0))
    assert float(cut_fraction(start, first)) == pytest.approx(3 / 5)  # of the first steps of Aa, bbb, B, ccc and CCC


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 5))
def test_split_is_balanced_and_complete(lengths: list[int], num: int, seed: int) -> None:
    sizes = torch.tensor(lengths)
    groups = split(sizes, num, torch.Generator().manual_seed(seed))
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    assert 1 <= len(groups) <= num
    assert all(len(ids) for ids in groups)
    for ids in groups:
        assert abs(int(sizes[ids].sum()) - sum(lengths) / num) <= max(lengths) or len(groups) < num
        assert int(sizes[ids].sum()) < sum(lengths) / num + max(lengths)
