"""What the ranks exchange in an update, so that it is one update over the steps of all of them.

A minibatch is the union of what each rank puts into it: M_r steps of rank r, M in all. The gradient of its mean loss is

    sum over r of  M_r / M * (gradient of rank r's mean loss),

all-reduced before clipping, so that all ranks clip and step alike. A rank without steps (M_r = 0) adds 0. Only steps
that count in the loss are steps here. For a process that trains alone only the gradients that are missing become 0.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppo_tbptt.ppo.advantages import Moments
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import Sequences

LARGE = 2**18
"""Elements of a gradient that is summed where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A rank's part of a minibatch."""

    ids: Int[Tensor, "_"]
    """Its sequences."""
    steps: int
    """M_r."""
    total_steps: int
    """M."""
    everywhere: bool
    """Whether every rank has steps of this minibatch."""
    moments: Moments | None = None
    """Of the advantages over all ranks; None: this rank's own will do."""


def all_reduce_steps(world: World, groups: Sequence[Tensor], counted: Int[Tensor, "S"]) -> list[Part]:
    """Find out how many steps of each minibatch there are; those without any, on any rank, are left out.

    Args:
        world: the ranks.
        groups: this rank's sequences of each minibatch, equally many minibatches on every rank.
        counted: steps of each sequence that count.
    """
    own = torch.stack([counted[ids].sum() for ids in groups])
    total, ranks = world.sum_(torch.stack([own, (own > 0).to(own.dtype)])).tolist()
    return [
        Part(ids=ids, steps=steps, total_steps=int(all_steps), everywhere=num_ranks == world.size)
        for ids, steps, all_steps, num_ranks in zip(groups, own.tolist(), total, ranks, strict=True)
        if all_steps
    ]


def all_reduce_moments(
    world: World, advantage: Float[Tensor, "T N"], sequences: Sequences, parts: Sequence[Part]
) -> list[Part]:
    """Add the mean and deviation of each minibatch's advantages over all ranks."""
    counts = sequences.mask if sequences.in_loss is None else sequences.in_loss
    label = torch.full((advantage.numel(),), len(parts))  # of steps that don't count: a minibatch that is dropped
    for number, part in enumerate(parts):
        label[sequences.index[:, part.ids][counts[:, part.ids]]] = number
    label = to_device(label, advantage.device)
    x = advantage.flatten().double()
    count = torch.tensor([*(part.total_steps for part in parts), 1], dtype=x.dtype, device=x.device)

    def mean(x: Tensor) -> Tensor:
        return world.sum_(x.new_zeros(len(count)).index_add_(0, label, x)) / count

    centre = mean(x)
    deviation = mean((x - centre[label]).square()).sqrt()
    moments = zip(parts, centre.to(advantage.dtype), deviation.to(advantage.dtype), strict=False)
    return [replace(part, moments=(a, b)) for part, a, b in moments]


def all_reduce_gradients(
    world: World, parameters: Iterable[nn.Parameter], figures: dict[str, Tensor], part: Part
) -> dict[str, Tensor]:
    """Replace the gradients by the sum over ranks of theirs times ``M_r / M``; return such sums of the figures.

    Large gradients are summed where they lie; the many small ones travel with the figures in one message.

    Args:
        world: the ranks.
        parameters: whose gradients; one that is missing, as on a rank without steps, is 0.
        figures: 0-d, by tag, the same tags on every rank that has steps, and none on the others.
        part: this rank's of the minibatch.
    """
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if world.size == 1:
        return figures
    tags = list(figures) if part.everywhere else next(filter(None, world.gather_json(list(figures))))
    grads = [p.grad for p in parameters if p.grad is not None]
    values = torch.stack(list(figures.values())) if figures else grads[0].new_zeros(len(tags))
    weight = part.steps / part.total_steps
    large = [world.start_sum_(g.mul_(weight)) for g in grads if _is_large(g)]
    small = [g for g in grads if not _is_large(g)]
    bucket = world.sum_(torch.cat([*(g.flatten() for g in small), values.to(grads[0].dtype)]).mul_(weight))
    *pieces, values = bucket.split([*(g.numel() for g in small), len(tags)])
    for g, piece in zip(small, pieces, strict=True):
        g.copy_(piece.view(g.shape))
    for wait in large:
        wait()
    return dict(zip(tags, values, strict=True))


def _is_large(x: Tensor) -> bool:
    return x.numel() >= LARGE and x.is_contiguous()


@torch.no_grad()
def broadcast_parameters(world: World, parameters: Sequence[nn.Parameter]) -> None:
    """Replace the parameters by rank 0's."""
    if world.size == 1:
        return
    bucket = torch.cat([p.flatten() for p in parameters])
    world.broadcast_(bucket)
    for p, piece in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        p.copy_(piece.view(p.shape))
