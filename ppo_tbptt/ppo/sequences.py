"""Episodes cut into sequences for truncated backpropagation through time, and minibatches of whole sequences.

A sequence starts at an episode's first step, at the rollout's first step, and every ``sequence_length`` steps after
either. Gradients stop at a sequence's start (its state is data) while the state's value flows on.

    env 0   |a a a a a|b b b b b b b          sequence_length = 4      aaaa a bbbb bbb
    env 1   |c c|d d d d d d d d d d    ──►   L = 4, S = 8             cc dddd dddd dd
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import AgentOutput, Frames, Minibatch, Obs, Rollout, Sequences, Targets


def cut(start: Bool[Tensor, "T N"], sequence_length: int | None) -> Sequences:
    """Cut a rollout into sequences of at most ``sequence_length`` steps (None: whole episodes within the rollout).

    Every step is in exactly one sequence, and counts; a sequence is consecutive in time, of one environment, and never
    crosses a start. ``L`` is the longest sequence, never the longest episode. Sequences are ordered by environment,
    then time.
    """
    steps, envs = start.shape
    t = torch.arange(steps)[:, None]
    first = start.cpu().clone()
    first[0] = True
    since = t - torch.where(first, t, 0).cummax(0).values  # steps since the piece of episode began  [T, N]
    begins = first if sequence_length is None else since % sequence_length == 0
    # In environment-major order every sequence is one contiguous run, and t = 0 always begins one.
    begin = begins.T.reshape(-1).nonzero().squeeze(1)  # [S]
    length = torch.diff(begin, append=torch.tensor([steps * envs]))  # [S]
    offset = torch.arange(int(length.max()))[:, None]  # [L, 1]
    mask = offset < length
    position = torch.where(mask, begin + offset, 0)  # [L, S], environment-major
    index = torch.where(mask, (position % steps) * envs + position // steps, 0)  # time-major
    return Sequences(index=index, mask=mask)


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
    mask = sequences.mask[:, ids]
    sequences_per_step = mask.sum(1)
    sequences_per_step = sequences_per_step[: int((sequences_per_step > 0).sum())]
    index = sequences.index[:, ids]
    device = rollout.value.device
    steps, firsts = index[mask], index[0]  # [M], time-major, and [S']
    valid, first = to_device(steps, device), to_device(firsts, device)
    in_loss = None
    if sequences.in_loss is not None:
        in_loss = to_device(sequences.in_loss[:, ids][mask].nonzero().squeeze(1), device)

    def pick(x: Tensor, at: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, at)

    def pick_obs(x: Tensor | Frames) -> Tensor | Frames:
        if isinstance(x, Frames):
            number = pick(x.number, steps)
            if len(x.table) >= x.number.numel():  # none repeats
                return to_device(x.table.index_select(0, to_device(number, x.table.device)), device)
            distinct, number = number.unique(return_inverse=True)
            table = x.table.index_select(0, to_device(distinct, x.table.device))
            return Frames(to_device(table, device), to_device(number, device))
        return pick(x, valid) if x.device == device else to_device(pick(x, steps), device)

    return Minibatch(
        obs={key: pick_obs(x) for key, x in rollout.obs.items()},
        action=pick(rollout.action, valid),
        log_prob=pick(rollout.log_prob, valid),
        value=pick(rollout.value, valid),
        advantage=pick(targets.advantage, valid),
        value_target=pick(targets.value_target, valid),
        state=pick(rollout.state, first),
        sequences_per_step=sequences_per_step,
        in_loss=in_loss,
    )


def only_counted(batch: Minibatch, output: AgentOutput) -> tuple[Minibatch, AgentOutput]:
    """Leave out the steps that don't count, of whatever has a row per step; the same objects where all count.

    ``state``, ``state_out`` and ``sequences_per_step`` go on describing the sequences as they were unrolled.
    """
    at = batch.in_loss
    if at is None:
        return batch, output

    def pick(x: Tensor) -> Tensor:
        return x.index_select(0, at)

    per_step = ("action", "log_prob", "value", "advantage", "value_target")
    obs: Obs = {
        key: Frames(x.table, pick(x.number)) if isinstance(x, Frames) else pick(x) for key, x in batch.obs.items()
    }
    extras = {key: pick(x) for key, x in output.extras.items()}
    outputs = ("logits", "value", "core_output", *(("features",) if output.features is not None else ()))
    return (
        replace(batch, obs=obs, **{name: pick(getattr(batch, name)) for name in per_step}),
        replace(output, extras=extras, **{name: pick(getattr(output, name)) for name in outputs}),
    )


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
