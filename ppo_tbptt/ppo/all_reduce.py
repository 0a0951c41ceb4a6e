"""What the ranks share in an update, so that it is one update over the steps of all of them.

A minibatch is the union of what each rank puts into it: M_r steps of rank r, M in all. The gradient of its mean loss is

    sum over r of  M_r / M * (gradient of rank r's mean loss),

summed in one exchange before clipping, so that all ranks clip and step alike. A rank without steps (M_r = 0) adds 0.
A process that trains alone goes through here unchanged.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import Sequences

Moments = tuple[Tensor, Tensor]
"""Mean and (population) deviation, 0-d."""
LARGE = 2**18
"""Elements of a gradient that is summed where it lies."""


def share_steps(
    world: World, groups: Sequence[Tensor], lengths: Int[Tensor, "S"]
) -> tuple[list[Tensor], list[int], list[int]]:
    """The minibatches that have steps on any rank, and their numbers of steps: this rank's, and those of all.

    ``groups`` are this rank's minibatches, equally many on every rank, some of which may be empty.
    """
    own = torch.stack([lengths[ids].sum() for ids in groups])
    both = zip(groups, own.tolist(), world.sum_(own.clone()).tolist(), strict=True)
    kept = [row for row in both if row[2]]
    return [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept]


def share_moments(
    world: World, advantage: Float[Tensor, "T N"], sequences: Sequences, groups: Sequence[Tensor], steps: Sequence[int]
) -> list[Moments]:
    """Mean and deviation of each minibatch's advantages over the ``steps`` of all ranks."""
    label = torch.empty(advantage.numel(), dtype=torch.int64)
    for number, ids in enumerate(groups):
        label[sequences.index[:, ids][sequences.mask[:, ids]]] = number
    label = to_device(label, advantage.device)
    x = advantage.flatten().double()
    count = torch.tensor(steps, dtype=x.dtype, device=x.device)

    def mean(x: Tensor) -> Tensor:
        return world.sum_(x.new_zeros(len(groups)).index_add_(0, label, x)) / count

    centre = mean(x)
    deviation = mean((x - centre[label]).square()).sqrt()
    return list(zip(centre.to(advantage.dtype), deviation.to(advantage.dtype), strict=True))


def share_gradients(
    world: World, parameters: Iterable[nn.Parameter], figures: Float[Tensor, "K"], weight: float
) -> Float[Tensor, "K"]:
    """Replace the gradients by the sum over ranks of ``weight`` times theirs; ``figures`` likewise, as the result.

    Large gradients are summed where they lie; the many small ones travel with the figures in one message.
    """
    if world.size == 1:
        return figures
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:  # a rank without steps
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in parameters if p.grad is not None]
    large = [world.start_sum_(g.mul_(weight)) for g in grads if _is_large(g)]
    small = [g for g in grads if not _is_large(g)]
    bucket = world.sum_(torch.cat([*(g.flatten() for g in small), figures.to(grads[0].dtype)]).mul_(weight))
    *parts, figures = bucket.split([*(g.numel() for g in small), len(figures)])
    for g, part in zip(small, parts, strict=True):
        g.copy_(part.view(g.shape))
    for wait in large:
        wait()
    return figures


def _is_large(x: Tensor) -> bool:
    return x.numel() >= LARGE and x.is_contiguous()


@torch.no_grad()
def share_weights(world: World, module: nn.Module) -> None:
    """Replace the parameters by rank 0's."""
    if world.size == 1:
        return
    parameters = list(module.parameters())
    bucket = torch.cat([p.flatten() for p in parameters])
    world.broadcast_(bucket)
    for p, part in zip(parameters, bucket.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view(p.shape))
