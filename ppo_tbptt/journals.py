"""The environments' episodes so far, as the tensors that a checkpoint holds."""

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.envs import EpisodeJournal


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
