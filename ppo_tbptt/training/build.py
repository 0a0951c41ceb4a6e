"""Builders of what a trainer trains with, from its config."""

from typing import Literal

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.envs import resolve_workers
from ppo_tbptt.envs.workers.fleet import Fleet, build_fleet
from ppo_tbptt.models import Agent
from ppo_tbptt.models.compile import CompileError, compile_encoder
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import build_losses
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Rollout


def build_envs(config: Config, world: World, device: torch.device) -> Fleet:
    """Build this rank's environments; environments are numbered over all ranks."""
    return build_fleet(
        config.env,
        seed=config.seed,
        first_env=world.rank * config.env.num_envs,
        num_workers=_workers_per_rank(config, world),
        cuda=device.type == "cuda",
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
