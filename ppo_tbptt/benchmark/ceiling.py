"""The ceiling: an iteration that is nothing but its network arithmetic and its environments, each measured alone.

    acting        T steps of acting on N real observations that are already on the device, on CUDA as one graph
    learning      epochs x minibatches of forward, backward, clipping and AdamW on full minibatches without padding
    environments  T steps of N environments with random actions over all workers, nothing else running

What an iteration takes beyond their sum is storage, transfers, targets, cutting and gathering, padding, and parts that
get in each other's way.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ppo_tbptt.benchmark.clock import seconds_per_call
from ppo_tbptt.config import Config
from ppo_tbptt.envs import LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.acting import Actor
from ppo_tbptt.ppo.collector import empty_rollout
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Minibatch, Obs, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceiling:
    """Seconds per iteration of each part, measured alone."""

    acting: float
    learning: float
    environments: float

    @property
    def seconds(self) -> float:
        return self.acting + self.learning + self.environments


def measure_ceiling(trainer: Trainer) -> Ceiling:
    """Time the parts; the trainer's weights change, its environments and workers stay idle."""
    config, agent = trainer.config, trainer.agent
    steps, sequences = unpadded(config)
    with _same_envs(trainer) as envs:
        play = RandomPlay(envs, config)
        environments = seconds_per_call(play, torch.device("cpu"))
        obs = {key: x.to(trainer.device) for key, x in play.record(steps * sequences).items()}
        now = {key: torch.from_numpy(x).to(trainer.device, copy=True) for key, x in envs.obs.items()}
    batch = full_minibatch(agent, obs, steps, sequences)
    update = seconds_per_call(lambda: _update(trainer.learner, batch), trainer.device)
    return Ceiling(
        acting=config.ppo.rollout_steps * _acting_seconds(agent, now),
        learning=update * config.ppo.num_epochs * config.batch_size / (steps * sequences),
        environments=config.ppo.rollout_steps * environments,
    )


def unpadded(config: Config) -> tuple[int, int]:
    """Steps per sequence and number of sequences of a minibatch that is full and has no padding."""
    ppo = config.ppo
    size = config.batch_size // ppo.num_minibatches
    steps = min(ppo.sequence_length or ppo.rollout_steps, size)
    return steps, size // steps


def _same_envs(trainer: Trainer) -> VectorEnv:
    env = trainer.config.env
    return VectorEnv(
        env.id,
        num_envs=env.num_envs,
        num_workers=trainer.envs.num_workers,
        options=env.options,
        max_episode_steps=env.max_episode_steps,
    )


class RandomPlay:
    """Each call is one step of all environments with random actions; episodes go on with new levels."""

    def __init__(self, envs: VectorEnv, config: Config) -> None:
        self._envs = envs
        self._random = np.random.default_rng(config.seed)
        self._seeds = LevelSeeds(config.seed, envs.num_envs, config.env.first_seed, config.env.num_seeds)
        envs.reset(self._seeds.current)
        self._seeds.advance(np.ones(envs.num_envs, dtype=np.bool_))

    def __call__(self) -> None:
        envs = self._envs
        action = self._random.integers(envs.spec.action_nvec, size=(envs.num_envs, len(envs.spec.action_nvec)))
        outcome = envs.step(action, self._seeds.current)
        self._seeds.advance(outcome.terminated | outcome.truncated)

    def record(self, count: int) -> Obs:
        """``count`` observations ``[count, ...]`` of further play."""
        rows: dict[str, list[np.ndarray]] = {key: [] for key in self._envs.obs}
        for _ in range(-(-count // self._envs.num_envs)):
            self()
            for key, x in self._envs.obs.items():
                rows[key].append(x.copy())
        return {key: torch.from_numpy(np.concatenate(x)[:count]) for key, x in rows.items()}


def full_minibatch(agent: Agent, obs: Obs, steps: int, sequences: int) -> Minibatch:
    """``sequences`` sequences of exactly ``steps`` steps with these observations ``[steps * sequences, ...]``."""
    shapes = {key: (tuple(x.shape[1:]), x.dtype) for key, x in obs.items()}
    rollout = empty_rollout(
        shapes,
        num_steps=steps,
        num_envs=sequences,
        num_branches=len(agent.action_nvec),
        state_size=agent.core.state_size,
        device=agent.device,
    )
    for key, x in obs.items():
        rollout.obs[key].copy_(x.view(rollout.obs[key].shape))
    for x in (rollout.state, rollout.action, rollout.log_prob, rollout.value):
        x.zero_()
    noise = torch.randn_like(rollout.value)
    whole = cut(rollout.start, None)
    return gather(rollout, Targets(advantage=noise, value_target=noise), whole, torch.arange(sequences))


def _update(learner: Learner, batch: Minibatch) -> None:
    """One update as the learner does it, with the arithmetic alone."""
    learner.agent.train()
    learner.optimizer.zero_grad(set_to_none=True)
    learner.backward(batch, learner.ppo_loss(0))
    nn.utils.clip_grad_norm_(learner.agent.parameters(), learner.config.max_grad_norm)
    learner.optimizer.step()


def _acting_seconds(agent: Agent, obs: Obs) -> float:
    actor, num_envs = Actor(agent), len(next(iter(obs.values())))
    state = agent.core.initial_state(num_envs)
    start = torch.zeros(num_envs, dtype=torch.bool, device=agent.device)
    noise = torch.rand(num_envs, len(agent.action_nvec), device=agent.device)
    with agent.acting():
        return seconds_per_call(lambda: actor(obs, state, start, noise), agent.device)
