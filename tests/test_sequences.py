"""Sequences partition the rollout, and minibatches the sequences."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.ppo.sequences import cut, cut_fraction, split
from ppo_tbptt.types import Sequences

Window = tuple[list[int], list[int], list[int]]
"""Steps ``t * N + n`` of a sequence: those that warm it, its own, and those of them that count."""


def windows(start: torch.Tensor, length: int | None, stride: int | None, burn_in: int) -> list[Window]:
    """By environment, then time, from the definition."""
    steps, envs = start.shape
    out: list[Window] = []
    for n in range(envs):
        begins = [t for t in range(steps) if t == 0 or start[t, n]]
        for begin, end in zip(begins, [*begins[1:], steps], strict=True):
            piece = [t * envs + n for t in range(begin, end)]
            k2 = length or len(piece)
            k1 = stride or k2
            for j in range(-(-len(piece) // k1)):
                first = 0 if length is None else max(0, (j + 1) * k1 - k2)
                last = (j + 1) * k1
                out.append((piece[max(0, first - burn_in) : first], piece[first:last], piece[j * k1 : last]))
    return out


def windows_of(sequences: Sequences) -> list[Window]:
    def columns(index: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        return [index[mask[:, s], s].tolist() for s in range(mask.shape[1])]

    index, mask, in_loss, warming = sequences.index, sequences.mask, sequences.in_loss, sequences.burn_in
    earlier = [[] for _ in range(mask.shape[1])] if warming is None else columns(warming.index, warming.mask)
    counted = columns(index, mask if in_loss is None else in_loss)
    return list(zip(earlier, columns(index, mask), counted, strict=True))


@given(st.integers(1, 30), st.integers(1, 3), st.none() | st.integers(1, 9), st.integers(0, 9), st.data())
def test_overlapping_windows_are_as_defined(
    steps: int, envs: int, length: int | None, burn_in: int, data: st.DataObject
) -> None:
    stride = data.draw(st.none() | st.integers(1, length or steps))
    start = torch.zeros(steps * envs, dtype=torch.bool)
    start[list(data.draw(st.sets(st.integers(0, steps * envs - 1), max_size=6)))] = True  # few, so that pieces are long
    start = start.view(steps, envs)
    sequences = cut(start, length, stride, burn_in)
    found = windows_of(sequences)
    assert found == windows(start, length, stride, burn_in)

    assert sorted(step for _, _, counted in found for step in counted) == list(range(steps * envs))  # each once
    assert sequences.counted.tolist() == [len(counted) for _, _, counted in found]
    assert sequences.computed == sum(len(warming) + len(own) for warming, own, _ in found)
    assert (sequences.in_loss is None) == (stride in (None, length))
    assert (sequences.burn_in is None) == (burn_in == 0)
    for layer in filter(None, (sequences, sequences.burn_in)):
        assert torch.equal(layer.mask, layer.mask.long().cummin(0).values.bool())  # padding only at the tail,
        assert not layer.index[~layer.mask].any()  # where indices are 0
        assert len(layer.mask) == layer.lengths.max()


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
