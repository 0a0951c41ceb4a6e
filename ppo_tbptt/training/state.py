"""Collects the state that a checkpoint holds, checks it and restores it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.config.load import validate
from ppo_tbptt.config.resume import continued
from ppo_tbptt.envs import BatchedEnv, Curriculum, EnvSpec
from ppo_tbptt.models.plugins import OUT_OF_MEMORY
from ppo_tbptt.ppo.learner import NonFiniteError
from ppo_tbptt.run.checkpoint import CheckpointError, save_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Carry

if TYPE_CHECKING:
    from ppo_tbptt.training.trainer import Trainer


def state_dict(trainer: "Trainer") -> dict[str, Any]:
    """Collect all that a resumed run needs, as plain tensors, numbers and text. All ranks call it together."""
    world, envs = trainer.world, trainer.envs
    levels = {"counts": []} if trainer.levels is None else trainer.levels.state_dict()

    def of_all_ranks(numbers: list[int]) -> list[int]:
        return torch.cat(world.gather(torch.tensor(numbers))).tolist()

    curriculum = None
    if isinstance(trainer.levels, Curriculum):
        curriculum = {name: levels[name] for name in ("open_stages", "scores")}
        curriculum["next_stages"] = of_all_ranks(levels["next_stages"])
    return {
        "version": version("ppo-tbptt"),
        "config": trainer.config.to_dict(),
        "spec": envs.spec.to_json(),
        "handed_in": trainer.handed_in,
        "iteration": trainer.iteration,
        "env_steps": trainer.env_steps,
        "agent": trainer.agent.state_dict(),
        **trainer.learner.state_dict(),
        "level_seeds": of_all_ranks(levels["counts"]),
        "curriculum": curriculum,
        "environments": _gather_environments(world, envs, trainer.carry),
        "faults": trainer.faults.state_dict(),
        "distinct_frames": world.gather_json(trainer.collector.observations.distinct),
        **trainer.rng.state_dict(),
        **trainer.checkpoints.state_dict(),
        "callbacks": {callback.name: callback.state_dict() for callback in trainer.user_callbacks if callback.name},
    }


def load_state_dict(trainer: "Trainer", tree: dict[str, Any], progress: Callable[[int, int], None] | None) -> Carry:
    """Restore all parts of ``tree``, which `state_dict` returned.

    The RNG states come last, because everything before may draw from them. With another number of ranks they are
    seeded anew; environments that can't return into their episodes begin new ones. The trainer's notes say so.

    Returns:
        The carry from which the environments go on.

    Raises:
        CheckpointError: the checkpoint has invalid values, or is of another agent or environment.
    """
    with _invalid_values():
        _check_tree(tree, state_size=trainer.agent.core.state_size)
        _check_spec(EnvSpec.from_json(tree["spec"]), trainer.envs.spec)
        trainer.agent.load_state_dict(tree["agent"])
        trainer.iteration, trainer.env_steps = tree["iteration"], tree["env_steps"]
        if trainer.iteration:
            trainer.learner.load_state_dict(tree)
        trainer.checkpoints.load_state_dict(tree)
        trainer.faults.load_state_dict(tree["faults"])
        saved = tree.get("callbacks", {})
        for callback in trainer.user_callbacks:
            if callback.name in saved:
                callback.load_state_dict(saved[callback.name])
        _load_levels(trainer, tree["level_seeds"], tree.get("curriculum"))
        if trainer.config.distinct_frames == "auto":
            by_rank = dict(enumerate(tree.get("distinct_frames", [])))
            trainer.collector.observations.distinct = by_rank.get(trainer.world.rank)
    carry = _resume_episodes(trainer, tree, progress)
    if len(tree["environments"]) == trainer.world.size:
        with _invalid_values():
            trainer.rng.load_state_dict(tree)
    else:
        trainer.rng.seed(trainer.env_steps)
        text = f"the checkpoint is of {len(tree['environments'])} rank(s), this run of {trainer.world.size}"
        trainer.notes.append(f"{text}: action noise, minibatches and dropout begin new random streams")
    return carry


@contextmanager
def _invalid_values() -> Iterator[None]:
    """Raise a `CheckpointError` in place of what loaders raise for invalid values."""
    try:
        yield
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # of many kinds
        reason = " ".join(f"{error}".split())[:300] or type(error).__name__
        raise CheckpointError(f"the checkpoint can't be gone on with: {reason}") from error


def load_run(
    run_dir: Path, overrides: dict[str, Any] | None, parts: dict[str, Any]
) -> tuple[Config, Config, dict[str, Any]]:
    """Load the newest whole checkpoint of a run.

    Returns:
        The config that the checkpoint was saved with, the one to go on with, and the checkpoint's tree.

    Raises:
        RunDirError, ConfigError: there is no such run, or an override can't change in a run.
        CheckpointError: there is none, or ``parts`` lack what was handed in and no config describes.
    """
    run = RunDir.open(run_dir)
    _, tree = run.load_newest()
    saved = Config.from_dict(tree["config"], source="the config in the checkpoint")
    config = continued(saved, Config.load(run.config, overrides))
    for name in tree.get("handed_in", []):
        if parts.get(name) is None:
            text = f"{run_dir}: its {name} was handed in and no config describes it"
            raise CheckpointError(f"{text}; resume with {name}=...")
    return saved, config, tree


@contextmanager
def saving_nonfinite_minibatch(trainer: "Trainer") -> Iterator[None]:
    """Write the last minibatch into the run folder where a `NonFiniteError` is raised."""
    try:
        yield
    except NonFiniteError as error:
        trainer.snapshot.discard()
        if trainer.run is None or error.minibatch is None:
            raise
        path = trainer.run.path / f"nonfinite_rank{trainer.world.rank}.pt"
        save_checkpoint(path, {"iteration": trainer.iteration + 1, "minibatch": asdict(error.minibatch)})
        raise NonFiniteError(f"{error}; the last minibatch is in {path}", error.minibatch) from error


def _check_spec(saved: EnvSpec, spec: EnvSpec) -> None:
    for name in ("obs", "action_nvec", "discrete"):
        old, new = getattr(saved, name), getattr(spec, name)
        if old != new:
            text = f"{spec.env_id}: its {name} is {new} now and was {old} when the run was saved"
            raise ValueError(f"{text}; the agent can't play it")


def _load_levels(trainer: "Trainer", counts: list[int], curriculum: dict[str, Any] | None) -> None:
    """Load this rank's counts of level seeds, and the curriculum's state; missing environments start from 0."""
    if trainer.levels is None:
        return
    num_envs, world = trainer.envs.num_envs, trainer.world
    own = slice(num_envs * world.rank, num_envs * (world.rank + 1))
    levels: dict[str, Any] = {"counts": [*counts, *[0] * (num_envs * world.size)][own]}
    if curriculum:
        levels |= {**curriculum, "next_stages": curriculum["next_stages"][own]}
    trainer.levels.load_state_dict(levels)


def _resume_episodes(trainer: "Trainer", tree: dict[str, Any], progress: Callable[[int, int], None] | None) -> Carry:
    """Replay the checkpoint's episodes; where that is impossible, begin new ones and add a note."""
    config, ranks = trainer.config, tree["environments"]
    saved, own = tree["config"]["env"], config.to_dict()["env"]
    changed = [key for key in ("options", "max_episode_steps", "num_envs") if saved.get(key) != own.get(key)]
    reason = f"env.{changed[0]} is another" if changed else ""
    if len(ranks) != trainer.world.size:
        reason = "the number of ranks is another"
    elif not config.env.replay or ranks[0].keys() <= {"start", "state"}:
        reason = "env.replay is, or was, false"
    if reason:
        trainer.notes.append(f"not exact: all environments begin new episodes, because {reason}")
        return trainer.collector.begin()
    rank = ranks[trainer.world.rank]
    carry, exact = trainer.collector.resume(rank, rank["start"], rank["state"], progress)
    if not exact.all():
        which = ", ".join(map(str, np.flatnonzero(~exact)[:10].tolist()))
        trainer.notes.append(
            f"not exact: {int((~exact).sum())} of {config.env.num_envs} environments (number {which}) did not repeat "
            "their episodes when played again, and begin new ones"
        )
    return carry


_Count = Annotated[int, Field(ge=0, lt=10**15)]


class _Curriculum(BaseModel, strict=True, allow_inf_nan=False):
    """The state of a curriculum."""

    next_stages: list[_Count]
    open_stages: _Count
    scores: list[float]


class _Numbers(BaseModel, strict=True, allow_inf_nan=False):
    """What is plain numbers in a checkpoint."""

    iteration: _Count
    env_steps: _Count
    level_seeds: list[_Count]
    faults: list[Annotated[list[_Count], Field(min_length=3, max_length=3)]]
    best: float | None
    recent: list[float]
    distinct_frames: list[bool | None] = Field(default=[])
    curriculum: _Curriculum | None = None


def _check_tree(tree: dict[str, Any], *, state_size: int) -> None:
    """Check types and ranges, except of weights and optimizer, which torch checks when it loads them.

    Raises:
        KeyError, TypeError, ValueError: something is missing or invalid.
    """
    validate(_Numbers, tree, "checkpoint")
    ranks = tree["environments"]
    if not isinstance(ranks, list) or len(ranks) != 1 + len(tree["generators_of_other_ranks"]):
        raise ValueError(f"environments of {len(ranks)} ranks")
    for rank in ranks:
        _check_environments(rank, state_size)


def _check_environments(rank: dict[str, Tensor], state_size: int) -> None:
    start, state = rank["start"], rank["state"]
    num = len(start)
    if start.dtype != torch.bool or state.dtype != torch.get_default_dtype() or state.shape != (num, state_size):
        raise ValueError(f"states of shape {tuple(state.shape)} for {num} environments")
    if not state.isfinite().all():
        raise ValueError("recurrent states that are not finite")
    if "steps" in rank:
        steps, actions = rank["steps"], rank["actions"]
        stage = rank.get("stage", steps)
        if not len(rank["seed"]) == len(rank["digest"]) == len(stage) == len(steps) == num or steps.min() < 0:
            raise ValueError(f"episodes of other than {num} environments")
        if actions.dim() != 2 or len(actions) != steps.sum() or actions.is_floating_point() or (actions < 0).any():
            raise ValueError(f"actions of shape {tuple(actions.shape)} for {int(steps.sum())} steps")


def _gather_environments(world: World, envs: BatchedEnv, carry: Carry) -> list[dict[str, Tensor]]:
    """Gather the carry's ``start`` and ``state``, and what environments need to return into their episodes, by rank.

    All ranks call it together.
    """
    own = {"start": carry.start.cpu(), "state": carry.state.cpu()}
    own |= {name: torch.as_tensor(x) for name, x in envs.state_dict().items()}
    gathered = {name: world.gather_rows(x) for name, x in own.items()}
    return [{name: xs[rank] for name, xs in gathered.items()} for rank in range(world.size)]
