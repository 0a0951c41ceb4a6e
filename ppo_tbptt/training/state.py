"""Whether what a checkpoint says of a run's progress can be true: a file may hold anything."""

import math
from typing import Any

import torch
from torch import Tensor

from ppo_tbptt.envs import BatchedEnv
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Carry

_LIMIT = 10**15
"""More than any count of steps."""


def check_saved_state(tree: dict[str, Any], *, state_size: int) -> None:
    """Types and ranges of what a trainer reads, but for weights and optimiser, which torch checks when it loads them.

    Raises:
        KeyError, TypeError, ValueError: something is missing, or can't be.
    """
    _counts("iteration", [tree["iteration"]])
    _counts("env_steps", [tree["env_steps"]])
    _counts("level_seeds", tree["level_seeds"])
    for row in tree["faults"]:
        _counts("faults", row, length=3)
    _numbers("best", [] if tree["best"] is None else [tree["best"]])
    _numbers("recent", tree["recent"])
    ranks = tree["environments"]
    if not isinstance(ranks, list) or len(ranks) != 1 + len(tree["generators_of_other_ranks"]):
        raise ValueError(f"environments of {len(ranks)} ranks")
    for rank in ranks:
        _environments(rank, state_size)


def _environments(rank: dict[str, Tensor], state_size: int) -> None:
    start, state = rank["start"], rank["state"]
    num = len(start)
    if start.dtype != torch.bool or state.dtype != torch.get_default_dtype() or state.shape != (num, state_size):
        raise ValueError(f"states of shape {tuple(state.shape)} for {num} environments")
    if not state.isfinite().all():
        raise ValueError("recurrent states that are not finite")
    if "steps" in rank:
        steps, actions = rank["steps"], rank["actions"]
        if not len(rank["seed"]) == len(rank["digest"]) == len(steps) == num or steps.min() < 0:
            raise ValueError(f"episodes of other than {num} environments")
        if actions.dim() != 2 or len(actions) != steps.sum() or actions.is_floating_point() or (actions < 0).any():
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {int(steps.sum())} steps")


def _counts(name: str, values: Any, length: int | None = None) -> None:
    if not isinstance(values, list) or (length is not None and len(values) != length):
        raise ValueError(f"{name} is {type(values).__name__}")
    for value in values:
        if type(value) is not int or not 0 <= value < _LIMIT:
            raise ValueError(f"{name} holds {str(value)[:40]!r}; must be a whole number from 0 on")


def _numbers(name: str, values: Any) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{name} is {type(values).__name__}")
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} holds {str(value)[:40]!r}; must be a number")


def saved_episodes(world: World, envs: BatchedEnv, carry: Carry) -> list[dict[str, Tensor]]:
    """By rank: ``start`` and ``state`` of the carry, and what the environments need to go on in their episodes.

    All ranks call it together.
    """
    own = {"start": carry.start.cpu(), "state": carry.state.cpu()}
    own |= {name: torch.as_tensor(x) for name, x in envs.state_dict().items()}
    gathered = {name: world.gather_rows(x) for name, x in own.items()}
    return [{name: xs[rank] for name, xs in gathered.items()} for rank in range(world.size)]
