"""The gradient probe: how far back through time a trained agent's loss gradient reaches."""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import LevelSeeds
from ppo_tbptt.envs.batched import make_vector_env
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import check_fits
from ppo_tbptt.ppo.advantages import compute_targets
from ppo_tbptt.ppo.collector import RolloutCollector, empty_rollout
from ppo_tbptt.ppo.instruments import horizon, measure, measuring, quotient
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.runtime.timing import Timer

MOST_ENVS = 64
"""Environments of the rollout at most: all its steps are unrolled together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientProbe:
    """The outcome of :func:`probe_gradients`; see :mod:`ppo_tbptt.ppo.instruments` for the figures."""

    env_id: str
    seeds: list[int]
    """Level seeds that episodes were drawn from."""
    sampling_seed: int
    rollout_steps: int
    num_envs: int
    gradient_norms: list[float]
    """By k, in units of that at k = 0."""
    gradient_horizon: int
    saturation: list[float]
    """Share of saturated gates by layer; empty where the core does not tell its gates."""
    state_norm: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them: None for norms that are not finite."""
        norms = [norm if math.isfinite(norm) else None for norm in self.gradient_norms]
        return asdict(self) | {"gradient_norms": norms}


def probe_gradients(
    policy: Policy,
    env: EnvConfig,
    *,
    seeds: Sequence[int],
    sampling_seed: int = 0,
    num_workers: int | Literal["auto"] = "auto",
) -> GradientProbe:
    """Measure gradients and states on one rollout, as long and cut as in the policy's training.

    Args:
        policy: what plays; its config has the loss.
        env: the task.
        seeds: consecutive level seeds, of which each episode draws one.
        sampling_seed: of the levels and the action noise.
        num_workers: processes that step the environments; the result does not depend on it.

    Raises:
        EnvError: the environment does not exist or does not fit the agent.
        WorkerError: an environment failed.
    """
    agent, config = policy.agent, policy.config
    num_envs, steps = min(env.num_envs, MOST_ENVS), config.ppo.rollout_steps
    levels = LevelSeeds(sampling_seed, num_envs, seeds[0], len(seeds))
    generator = torch.Generator().manual_seed(sampling_seed)
    uniforms = torch.rand(steps, num_envs, len(agent.action_nvec), generator=generator)
    how = {"num_envs": num_envs, "num_workers": num_workers, "previous": agent.previous}
    with make_vector_env(env, levels, **how) as envs:
        check_fits(agent, envs.spec)
        storage = empty_rollout(agent, steps, num_envs, state_spacing=config.ppo.state_spacing)
        with closing(RolloutCollector(envs, agent)) as collector:
            rollout = collector.collect(collector.begin(), storage, uniforms, Timer()).rollout
    targets = compute_targets(rollout, gamma=config.ppo.gamma, gae_lambda=config.ppo.gae_lambda)
    learner = Learner(agent, config.ppo, total_steps=config.total_steps, generator=generator)
    with measuring(agent):
        measured = measure(agent, rollout, targets, learner.ppo_loss(policy.env_steps))
    curve = quotient(measured["gradient"])
    return GradientProbe(
        env_id=env.id,
        seeds=list(seeds),
        sampling_seed=sampling_seed,
        rollout_steps=steps,
        num_envs=num_envs,
        gradient_norms=curve.tolist(),
        gradient_horizon=horizon(curve),
        saturation=quotient(measured["saturation"]).tolist(),
        state_norm=float(quotient(measured["state_norm"])),
    )
