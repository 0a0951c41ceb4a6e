"""cut, split and gather."""

import pytest
import torch
from helpers import fake_rollout, fake_targets, small_agent
from hypothesis import given
from hypothesis import strategies as st

from ppo_tbptt.ppo.sequences import cut, gather, padding_fraction, split


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


def test_cut_by_hand() -> None:
    start = torch.zeros(6, 2, dtype=torch.bool)
    start[5, 0] = start[2, 1] = True
    sequences = cut(start, 4)
    pieces = [sequences.index[:n, s].tolist() for s, n in enumerate(sequences.lengths.tolist())]
    assert pieces == [[0, 2, 4, 6], [8], [10], [1, 3], [5, 7, 9, 11]]


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


def test_split_is_fresh_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.full((32,), 4)
    assert not torch.equal(torch.cat(split(sizes, 4, generator)), torch.cat(split(sizes, 4, generator)))


def test_fewer_sequences_than_minibatches() -> None:
    groups = split(torch.tensor([5, 5, 5]), 8, torch.Generator().manual_seed(0))
    assert sorted(len(ids) for ids in groups) == [1, 1, 1]


@pytest.mark.parametrize("length", [1, 3, None])
def test_gather_keeps_rows_together(length: int | None) -> None:
    """Every field of a valid step comes from the same step; the state from the sequence's first one."""
    agent = small_agent()
    start = torch.rand(9, 3, generator=torch.Generator().manual_seed(2)) < 0.3
    rollout, sequences = fake_rollout(agent, start), cut(start, length)
    targets = fake_targets(rollout)
    ids = torch.tensor([2, 0])
    batch = gather(rollout, targets, sequences, ids)
    ids = sorted(ids.tolist(), key=lambda s: -int(sequences.lengths[s]))  # the longest first
    assert len(batch.sequences_per_step) == sequences.lengths[ids].max()  # no longer than this minibatch's longest
    row = 0
    for step in range(len(batch.sequences_per_step)):
        assert batch.sequences_per_step[step] == sum(int(sequences.lengths[s]) > step for s in ids)
        for column, s in enumerate(ids):
            if step >= sequences.lengths[s]:
                continue
            t, n = divmod(int(sequences.index[step, s]), 3)
            assert torch.equal(batch.obs["obs"][row], rollout.obs["obs"][t, n])
            assert torch.equal(batch.action[row], rollout.action[t, n])
            assert torch.equal(batch.log_prob[row], rollout.log_prob[t, n])
            assert batch.value[row] == rollout.value[t, n]
            assert batch.advantage[row] == targets.advantage[t, n]
            assert batch.value_target[row] == targets.value_target[t, n]
            if step == 0:
                assert torch.equal(batch.state[column], rollout.state[t, n])
            row += 1
    assert row == len(batch.value)


def test_padding_fraction() -> None:
    start = torch.zeros(6, 2, dtype=torch.bool)
    start[2, 1] = True  # lengths 6, 2, 4
    sequences = cut(start, None)
    assert padding_fraction(sequences, [torch.tensor([0, 1, 2])]) == pytest.approx(1 - 12 / 18)
    assert padding_fraction(sequences, [torch.tensor([0]), torch.tensor([1, 2])]) == pytest.approx(1 - 12 / 14)
