"""The ceiling: an iteration that is nothing but its network arithmetic and its environments, each measured alone.

    acting        T steps of acting on N real observations that are already on the device, on CUDA as one graph
    learning      epochs x minibatches of forward, backward, clipping and AdamW on full minibatches without padding
    environments  T steps of N environments with random actions over all workers, nothing else running

What an iteration takes beyond their sum is storage, transfers, targets, cutting and gathering, padding, and parts that
get in each other's way.
"""

import numpy as np
import torch
from torch import nn

from ppo_tbptt.benchmark.arithmetic import seconds_per_call
from ppo_tbptt.config import Config
from ppo_tbptt.envs import BatchedEnv, LevelSeeds
from ppo_tbptt.envs.batched import make_vector_env
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.acting import Actor
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Minibatch, Obs


def measure_ceiling(trainer: Trainer) -> dict[str, float]:
    """Measure seconds per iteration of each part; the trainer's weights change, its environments are left alone."""
    config, agent = trainer.config, trainer.agent
    steps, sequences = unpadded(config)
    env, random = config.env, np.random.default_rng(config.seed)
    levels = LevelSeeds(config.seed, env.num_envs, env.first_seed, env.num_seeds)
    with make_vector_env(env, levels, previous=config.model.previous) as envs:
        envs.reset()
        environments = seconds_per_call(lambda: _play_randomly(envs, random))
        obs = {key: x.to(trainer.device) for key, x in _random_observations(envs, random, steps * sequences).items()}
        now = {key: torch.as_tensor(x).to(trainer.device, copy=True) for key, x in envs.obs.items()}
    actor, state = Actor(agent), agent.core.initial_state(env.num_envs)
    start = torch.zeros(env.num_envs, dtype=torch.bool, device=agent.device)
    uniforms = torch.rand(env.num_envs, len(agent.action_nvec), device=agent.device)
    with agent.acting():
        acting = seconds_per_call(lambda: actor(now, state, start, uniforms))
    batch = full_minibatch(agent, obs, steps, sequences)
    update = seconds_per_call(lambda: _update(trainer.learner, batch))
    return {
        "acting": config.ppo.rollout_steps * acting,
        "learning": update * config.ppo.num_epochs * config.batch_size / (steps * sequences),
        "environments": config.ppo.rollout_steps * environments,
    }


def unpadded(config: Config) -> tuple[int, int]:
    """Return steps per sequence and number of sequences of a full minibatch without padding."""
    ppo = config.ppo
    size = config.batch_size // ppo.num_minibatches
    steps = min(ppo.sequence_length or ppo.rollout_steps, size)
    return steps, size // steps


def _play_randomly(envs: BatchedEnv, random: np.random.Generator) -> None:
    """Take one step with random actions."""
    envs.step(random.integers(envs.spec.action_nvec, size=(envs.num_envs, len(envs.spec.action_nvec))))


def _random_observations(envs: BatchedEnv, random: np.random.Generator, count: int) -> Obs:
    """Return ``count`` observations ``[count, ...]`` of random play."""
    rows: list[Obs] = []
    for _ in range(-(-count // envs.num_envs)):
        _play_randomly(envs, random)
        rows.append({key: torch.as_tensor(x).clone() for key, x in envs.obs.items()})
    return {key: torch.cat([obs[key] for obs in rows])[:count] for key in envs.obs}


def full_minibatch(agent: Agent, obs: Obs, steps: int, sequences: int) -> Minibatch:
    """Make ``sequences`` sequences of exactly ``steps`` steps with these observations ``[steps * sequences, ...]``."""
    num, branches, device = steps * sequences, len(agent.action_nvec), agent.device
    noise = torch.randn(num, device=device)
    return Minibatch(
        obs=obs,
        action=torch.zeros(num, branches, dtype=torch.int64, device=device),
        log_prob=torch.zeros(num, branches, device=device),
        value=torch.zeros(num, device=device),
        advantage=noise,
        value_target=noise,
        state=agent.core.initial_state(sequences).detach(),
        start=torch.ones(sequences, dtype=torch.bool, device=device),
        sequences_per_step=torch.full((steps,), sequences),
    )


def _update(learner: Learner, batch: Minibatch) -> None:
    """Do the arithmetic of one update, and nothing else."""
    learner.agent.train()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.backward(batch, learner.ppo_loss(0))
    nn.utils.clip_grad_norm_(learner.agent.parameters(), learner.config.max_grad_norm)
    learner.optimizer.step()
