"""Episodes cut into sequences for truncated backpropagation through time, and minibatches of whole sequences.

A sequence starts at an episode's first step, at the rollout's first step, and every ``sequence_length`` steps after
either. Gradients stop at a sequence's start (its state is data) while the state's value flows on.

    env 0   |a a a a a|b b b b b b b          sequence_length = 4      aaaa a bbbb bbb
    env 1   |c c|d d d d d d d d d d    ──►   L = 4, S = 8             cc dddd dddd dd

With a stride k1 below the length k2 sequences overlap: BPTT(k1, k2) of Williams and Peng 1990 (An efficient
gradient-based algorithm for on-line training of recurrent network trajectories). The j-th of an episode (or of what the
rollout holds of it) is its steps from ``max(0, (j + 1) k1 - k2)`` up to ``(j + 1) k1``, of which the last k1 count.

    env 0   |0 1 2 3 4 5 6      stride = 2, sequence_length = 4   ──►   01  0123  2345  456     (count: 01 23 45 6)
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import BurnIn, Frames, Minibatch, Obs, Rollout, Sequences, Targets


def cut(
    start: Bool[Tensor, "T N"], sequence_length: int | None, stride: int | None = None, burn_in: int = 0
) -> Sequences:
    """Cut a rollout into sequences of at most ``sequence_length`` steps (None: whole episodes within the rollout).

    A sequence is consecutive in time, of one environment, and never crosses a start, nor does its burn-in. Sequences
    are ordered by environment, then time. Every step counts in exactly one of them.

    Args:
        start: where episodes start.
        sequence_length: k2.
        stride: k1, steps of a sequence that count, its last ones; None: all do, and none overlap.
        burn_in: steps before a sequence that warm its state, as far as there are any.

    Returns:
        Indices, where ``L`` is the longest sequence, never the longest episode; ``in_loss`` is None where all steps of
        sequences count, ``burn_in`` is None without.
    """
    steps, envs = start.shape
    length = sequence_length or 2 * steps  # longer than whatever the rollout holds
    stride = stride or length
    t = torch.arange(steps)[:, None]
    first = start.cpu().clone()
    first[0] = True
    since = t - torch.where(first, t, 0).cummax(0).values  # steps since the piece of episode began  [T, N]
    # In environment-major order each sequence's steps that count are one contiguous run, and t = 0 always begins one.
    begin = (since % stride == 0).T.reshape(-1).nonzero().squeeze(1)  # [S]
    counted = torch.diff(begin, append=torch.tensor([steps * envs]))  # [S]
    before = since.T.reshape(-1)[begin]  # [S]
    overlap = before.clamp(max=length - stride)
    warming = (before - overlap).clamp(max=burn_in)
    sequences = _columns(begin - overlap, overlap + counted, steps, envs)
    in_loss = sequences.mask & (torch.arange(len(sequences.mask))[:, None] >= overlap) if stride < length else None
    earlier = _columns(begin - overlap - warming, warming, steps, envs) if burn_in else None
    return replace(sequences, in_loss=in_loss, burn_in=earlier)


def _columns(begin: Int[Tensor, "S"], length: Int[Tensor, "S"], steps: int, envs: int) -> Sequences:
    """Lay out contiguous runs of environment-major positions as columns of time-major ones."""
    offset = torch.arange(int(length.max()))[:, None]  # [L, 1]
    mask = offset < length
    position = torch.where(mask, begin + offset, 0)  # [L, S]
    return Sequences(index=torch.where(mask, (position % steps) * envs + position // steps, 0), mask=mask)


def split(
    counted: Int[Tensor, "S"], num_minibatches: int, generator: torch.Generator, *, keep_empty: bool = False
) -> list[Int[Tensor, "_"]]:
    """Draw a permutation of the sequences and split it so that all minibatches hold about as many steps that count.

    Args:
        counted: number of steps of each sequence that count.
        num_minibatches: at most so many; fewer where there are fewer sequences.
        generator: of the permutation, on the CPU.
        keep_empty: return exactly ``num_minibatches``, some of which may be empty.

    Returns:
        Sequence numbers of each minibatch. Each differs from the ideal number of steps by less than the longest
        sequence.
    """
    order = torch.randperm(len(counted), generator=generator)
    ends = counted[order].cumsum(0)
    middle = 2 * ends - counted[order]  # twice the middle of each sequence, to stay in integers
    group = (middle * num_minibatches // (2 * int(ends[-1]))).clamp(max=num_minibatches - 1)
    sizes = torch.bincount(group, minlength=num_minibatches).tolist()
    return [ids for ids in order.split(sizes) if keep_empty or len(ids)]


def gather(rollout: Rollout, targets: Targets, sequences: Sequences, ids: Int[Tensor, "_"]) -> Minibatch:
    """Gather the sequences ``ids``, in descending order of length, on the device of ``rollout.value``.

    Observations may be stored elsewhere, on the host. Of frames that repeat only the distinct ones are gathered.
    """
    ids = ids[sequences.lengths[ids].argsort(descending=True, stable=True)]
    steps, sequences_per_step = _pack(sequences, ids)
    device = rollout.value.device
    valid, first = to_device(steps, device), to_device(sequences.index[0, ids], device)
    in_loss = None
    if sequences.in_loss is not None:
        in_loss = to_device(sequences.in_loss[:, ids][sequences.mask[:, ids]].nonzero().squeeze(1), device)
    return Minibatch(
        obs=_gather_obs(rollout, steps, repeat=sequences.in_loss is not None),
        action=_rows(rollout.action, valid),
        log_prob=_rows(rollout.log_prob, valid),
        value=_rows(rollout.value, valid),
        advantage=_rows(targets.advantage, valid),
        value_target=_rows(targets.value_target, valid),
        state=rollout.state.at(first),
        start=_rows(rollout.start, first),
        sequences_per_step=sequences_per_step,
        in_loss=in_loss,
        burn_in=None if sequences.burn_in is None else _gather_burn_in(rollout, sequences.burn_in, ids),
    )


def _gather_burn_in(rollout: Rollout, burn_in: Sequences, ids: Int[Tensor, "S"]) -> BurnIn | None:
    """Gather the steps before the sequences ``ids`` of a minibatch; None where there are none."""
    sequence = burn_in.lengths[ids].argsort(descending=True, stable=True)
    sequence = sequence[burn_in.lengths[ids[sequence]] > 0]
    if not len(sequence):
        return None
    steps, sequences_per_step = _pack(burn_in, ids[sequence])
    device = rollout.value.device
    return BurnIn(
        obs=_gather_obs(rollout, steps, repeat=True),
        state=rollout.state.at(to_device(burn_in.index[0, ids[sequence]], device)),
        sequences_per_step=sequences_per_step,
        sequence=to_device(sequence, device),
    )


def _pack(sequences: Sequences, ids: Int[Tensor, "S"]) -> tuple[Int[Tensor, "M"], Int[Tensor, "L"]]:
    """Return the steps of these sequences, the longest of which comes first, and how many there are at each step."""
    mask = sequences.mask[:, ids]
    sequences_per_step = mask.sum(1)
    return sequences.index[:, ids][mask], sequences_per_step[: int((sequences_per_step > 0).sum())]


def _rows(x: Tensor, at: Int[Tensor, "M"]) -> Tensor:
    return x.flatten(0, 1).index_select(0, at)


def _gather_obs(rollout: Rollout, steps: Int[Tensor, "M"], *, repeat: bool) -> Obs:
    """Gather the observations of ``steps`` (on the CPU), each distinct frame once.

    ``repeat`` says that steps repeat, hence frames do even where all those of the rollout differ.
    """
    device = rollout.value.device

    def gather(x: Tensor | Frames) -> Tensor | Frames:
        if not isinstance(x, Frames):
            return to_device(_rows(x, to_device(steps, x.device)), device)
        number = _rows(x.number, steps)
        if len(x.table) >= x.number.numel() and not repeat:
            return to_device(x.table.index_select(0, to_device(number, x.table.device)), device)
        distinct, number = number.unique(return_inverse=True)
        table = x.table.index_select(0, to_device(distinct, x.table.device))
        return Frames(to_device(table, device), to_device(number, device))

    return {key: gather(x) for key, x in rollout.obs.items()}


def only_counted(batch: Minibatch) -> Minibatch:
    """Leave out the steps that don't count, of whatever has a row per step; the same object where all count.

    ``state``, ``burn_in`` and ``sequences_per_step`` go on describing the sequences as they are unrolled.
    """
    at = batch.in_loss
    if at is None:
        return batch

    def pick(x: Tensor) -> Tensor:
        return x.index_select(0, at)

    per_step = ("action", "log_prob", "value", "advantage", "value_target")
    obs: Obs = {
        key: Frames(x.table, pick(x.number)) if isinstance(x, Frames) else pick(x) for key, x in batch.obs.items()
    }
    return replace(batch, obs=obs, **{name: pick(getattr(batch, name)) for name in per_step})


def padding_fraction(sequences: Sequences, groups: Sequence[Tensor]) -> float:
    """Return the share of padding if each group were padded to its own longest sequence.

    What a core over packed sequences saves, and what one that needs padding computes.
    """
    lengths = sequences.lengths
    padded = sum(int(lengths[ids].max()) * len(ids) for ids in groups)
    return 1.0 - int(lengths.sum()) / padded


def cut_fraction(start: Bool[Tensor, "T N"], sequences: Sequences) -> Float[Tensor, ""]:
    """Return the share of steps whose episode began before their sequence: gradients don't reach that beginning.

    Steps are those that count. On the device of ``start``, which is not waited for.
    """
    first, counted = (to_device(x, start.device) for x in (sequences.index[0], sequences.counted))
    whole = start.flatten().index_select(0, first)
    return 1 - (counted * whole).sum() / counted.sum()
