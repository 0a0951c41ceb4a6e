"""Builders of what a trainer trains with, from its config."""

from typing import Literal

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.envs import BatchedEnv, FaultBudget, LevelSeeds, LevelSource, resolve_workers
from ppo_tbptt.envs.batched import double_buffered, make_vector_env
from ppo_tbptt.models import Agent
from ppo_tbptt.models.compile import CompileError, compile_encoder
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import build_losses
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Rollout


def build_levels(config: Config, world: World) -> LevelSeeds:
    """Build the level source of this rank's environments, which are numbered over all ranks."""
    env = config.env
    return LevelSeeds(config.seed, env.num_envs, env.first_seed, env.num_seeds, world.rank * env.num_envs)


def build_envs(
    config: Config, levels: LevelSource, faults: FaultBudget, world: World, device: torch.device
) -> BatchedEnv:
    """Build this rank's environments."""
    return make_vector_env(
        config.env,
        levels,
        num_workers=_workers_per_rank(config, world),
        two_groups=double_buffered(config.env, cuda=device.type == "cuda"),
        replay=config.env.replay,
        faults=faults,
    )


def build_learner(config: Config, agent: Agent, generator: torch.Generator, world: World) -> Learner:
    """Build the learner; ``generator`` permutes the minibatches."""
    return Learner(
        agent,
        config.ppo,
        total_steps=config.total_steps,
        generator=generator,
        world=world,
        max_nonfinite=config.train.max_nonfinite_updates,
        auxiliary=build_losses(config.losses, agent),
    )


def compile_updates(learner: Learner, storage: Rollout, num_steps: int) -> list[str]:
    """Compile the encoder for minibatches of about ``num_steps`` steps.

    Returns:
        A note for the user where compiling fails; the learner stays as it is then.
    """
    device = storage.value.device
    num_steps = max(2, num_steps)
    obs = {key: torch.zeros(num_steps, *x.shape[2:], dtype=x.dtype, device=device) for key, x in storage.obs.items()}
    try:
        learner.encode = compile_encoder(learner.agent, obs)
    except CompileError as error:
        return [f"not compiled, training goes on without: {error}"]
    return []


def describe_storage(storage: Rollout) -> list[str]:
    """Return a note for the user where observations are stored on the host of a GPU."""
    on_host = [x for x in storage.obs.values() if x.device != storage.value.device]
    return [f"observations are stored on the host: {sum(x.nbytes for x in on_host) / 1e9:.1f} GB"] if on_host else []


def _workers_per_rank(config: Config, world: World) -> int | Literal["auto"]:
    """Divide the cores of a machine among its ranks."""
    env, ranks = config.env, world.local_size
    if env.num_workers != "auto" or ranks == 1:
        return env.num_workers
    return max(1, resolve_workers("auto", env.num_envs * ranks) // ranks)
