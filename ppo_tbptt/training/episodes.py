"""The environments' episodes so far, as the tensors that a checkpoint holds, and the way back into them."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.envs import EpisodeJournal
from ppo_tbptt.envs.workers.fleet import Fleet
from ppo_tbptt.ppo.collector import Sampler
from ppo_tbptt.types import Carry


def saved_episodes(world: World, fleet: Fleet, carry: Carry, *, replay: bool) -> list[dict[str, Tensor]]:
    """By rank: ``start`` and ``state`` of the carry, and with ``replay`` each environment's episode (see `pack`).

    All ranks call it together.
    """
    own = {"start": carry.start.cpu(), "state": carry.state.cpu()}
    if replay:
        own |= pack(fleet.journal())
    gathered = {name: world.gather_rows(x) for name, x in own.items()}
    return [{name: xs[rank] for name, xs in gathered.items()} for rank in range(world.size)]


def go_on(
    sampler: Sampler, saved: dict[str, Tensor], progress: Callable[[int, int], None] | None
) -> tuple[Carry, np.ndarray]:
    """Play a rank's saved episodes again, up to where they were.

    Returns the carry from there, and bool ``[N]``: False where that did not repeat what had been seen, and an episode
    of the next level begins instead.
    """
    exact = sampler.fleet.restore(unpack(saved), progress)
    device = sampler.agent.device
    start = saved["start"] | torch.from_numpy(~exact)
    return Carry(obs=sampler.obs(), start=start.to(device), state=saved["state"].to(device)), exact


def pack(journals: list[EpisodeJournal]) -> dict[str, Tensor]:
    """``seed``, ``steps`` and ``digest`` i64 ``[N]``, and ``actions`` ``[sum of steps, A]`` in the order of N."""
    return {
        "seed": torch.tensor([journal.seed for journal in journals]),
        "steps": torch.tensor([len(journal.actions) for journal in journals]),
        "digest": torch.from_numpy(np.array([journal.hash for journal in journals], np.uint64).view(np.int64)),
        "actions": torch.from_numpy(np.concatenate([journal.actions for journal in journals])),
    }


def unpack(tree: dict[str, Tensor]) -> list[EpisodeJournal]:
    """The inverse of `pack`.

    Raises:
        ValueError, KeyError: ``tree`` is not what `pack` made.
    """
    seeds, steps = tree["seed"].tolist(), tree["steps"].tolist()
    digests = tree["digest"].numpy().view(np.uint64).tolist()
    actions = np.split(tree["actions"].numpy(), np.cumsum(steps)[:-1])
    rows = zip(seeds, actions, digests, strict=True)
    return [EpisodeJournal(seed=seed, actions=action, hash=digest) for seed, action, digest in rows]
