"""Builders of what a trainer trains with, from its config."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ppo_tbptt.config import Config, ConfigError, CurriculumConfig
from ppo_tbptt.envs import BatchedEnv, Curriculum, EnvSpec, FaultBudget, LevelSeeds, LevelSource, resolve_workers
from ppo_tbptt.envs.batched import double_buffered, make_vector_env
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.models.compile import CompileError, compile_encoder
from ppo_tbptt.ppo.all_reduce import broadcast_parameters
from ppo_tbptt.ppo.collector import RolloutCollector, empty_rollout, obs_dtype
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import build_losses
from ppo_tbptt.runtime.device import resolve_precision, storage_device
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.types import Rollout

if TYPE_CHECKING:
    from ppo_tbptt.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Parts:
    """What a trainer trains with; ``levels`` is the level source of the config's environments alone."""

    envs: BatchedEnv
    levels: LevelSeeds | None
    agent: Agent
    collector: RolloutCollector
    storage: Rollout
    learner: Learner


def build_parts(trainer: "Trainer", envs: BatchedEnv | None, agent: Agent | None, closing: ExitStack) -> Parts:
    """Build what was not handed in; ``closing`` closes environments and collector, also where building fails."""
    config, world, device = trainer.config, trainer.world, trainer.device
    plan = config.env.curriculum
    levels: LevelSeeds | None = None
    if envs is None:
        levels = build_levels(config, world)
        envs = build_envs(config, levels, trainer.faults.budget, world, device)
    closing.callback(envs.close)
    if plan.stages:
        check_curriculum(plan, envs.spec, levels)
    agent = build_agent(config, envs.spec, device) if agent is None else agent.to(device)
    collector, storage = build_collector(config, envs, agent, trainer.notes)
    closing.callback(collector.close)
    learner = build_learner(config, agent, trainer.rng.permutation, world)
    if config.compile:
        compile_updates(learner, config, trainer.notes)
    return Parts(envs, levels, agent, collector, storage, learner)


def with_resolved_precision(config: Config, device: torch.device) -> Config:
    """Name in ``config``, which will be saved with the run, the precision that ``auto`` means on ``device``."""
    precision = resolve_precision(config.precision, device)
    return config.replace(precision=str(precision).removeprefix("torch."))


def build_levels(config: Config, world: World) -> LevelSeeds:
    """Build the level source of this rank's environments, which are numbered over all ranks."""
    env, plan = config.env, config.env.curriculum
    seeds = config.seed, env.num_envs, env.first_seed, env.num_seeds, world.rank * env.num_envs
    if not plan.stages:
        return LevelSeeds(*seeds)
    how = {"own_share": plan.own_share, "threshold": plan.threshold, "episodes": plan.episodes}
    return Curriculum(*seeds, num_stages=len(plan.stages), **how)


def check_curriculum(plan: CurriculumConfig, spec: EnvSpec, levels: LevelSeeds | None) -> None:
    """Check that environments with these `levels` can follow the plan.

    Raises:
        ConfigError: they were handed in, or can't reach its threshold.
    """
    if levels is None:
        raise ConfigError("env.curriculum.stages: environments that are handed in draw their own levels; must be []")
    if spec.headline_max is not None and plan.threshold > spec.headline_max:
        text = f"{plan.threshold} is more than {spec.headline} can be; must be at most {spec.headline_max}"
        raise ConfigError(f"env.curriculum.threshold: {text}")


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
        stages=config.env.curriculum.stages,
        faults=faults,
        previous=config.model.previous,
    )


def build_collector(
    config: Config, envs: BatchedEnv, agent: Agent, notes: list[str]
) -> tuple[RolloutCollector, Rollout]:
    """Build the collector and its storage; ``notes`` get a line where observations are stored on a GPU's host."""
    row = sum(math.prod(shape) * obs_dtype(shape).itemsize for shape in agent.obs_shapes.values())
    obs_device = storage_device(config.storage, config.batch_size * row, agent.device)
    if obs_device != agent.device:
        notes.append(f"observations are stored on the host: {config.batch_size * row / 1e9:.1f} GB")
    distinct = {"on": True, "off": False, "auto": None}[config.distinct_frames]
    collector = RolloutCollector(envs, agent, obs_device=obs_device, distinct_frames=distinct)
    ppo = config.ppo
    return collector, empty_rollout(agent, ppo.rollout_steps, config.env.num_envs, obs_device, ppo.state_spacing)


def build_learner(config: Config, agent: Agent, generator: torch.Generator, world: World) -> Learner:
    """Build the learner, whose parameters become rank 0's; ``generator`` permutes the minibatches."""
    reconstruction = config.aux.reconstruction_coef
    losses = {**({"reconstruction": reconstruction} if reconstruction else {}), **config.losses}
    learner = Learner(
        agent,
        config.ppo,
        total_steps=config.total_steps,
        generator=generator,
        world=world,
        max_nonfinite=config.train.max_nonfinite_updates,
        auxiliary=build_losses(losses, agent),
    )
    broadcast_parameters(world, learner.parameters())
    return learner


def fit_normalization(trainer: "Trainer") -> None:
    """Fit an agent built here to the observations that its environments begin with: rank 0's, on all ranks."""
    if "agent" not in trainer.handed_in:
        encoder, device = trainer.agent.encoder, trainer.device
        encoder.fit_normalization({key: torch.as_tensor(x, device=device) for key, x in trainer.envs.obs.items()})
        for buffer in filter(torch.numel, encoder.buffers()):
            trainer.world.broadcast_(buffer)


def compile_updates(learner: Learner, config: Config, notes: list[str]) -> None:
    """Compile the encoder for the config's minibatches; ``notes`` get a line where compiling fails."""
    agent, num_steps = learner.agent, max(2, config.batch_size // config.ppo.num_minibatches)
    shapes = agent.obs_shapes.items()
    obs = {key: torch.zeros(num_steps, *shape, dtype=obs_dtype(shape), device=agent.device) for key, shape in shapes}
    try:
        learner.encode = compile_encoder(learner.agent, obs)
    except CompileError as error:
        notes.append(f"not compiled, training goes on without: {error}")


def _workers_per_rank(config: Config, world: World) -> int | Literal["auto"]:
    """Divide the cores of a machine among its ranks."""
    env, ranks = config.env, world.local_size
    if env.num_workers != "auto" or ranks == 1:
        return env.num_workers
    return max(1, resolve_workers("auto", env.num_envs * ranks) // ranks)
