"""Where rollouts are kept."""

import math

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.runtime.device import storage_device
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.types import Rollout, empty_rollout


def rollout_storage(config: Config, spec: EnvSpec, state_size: int, device: torch.device) -> Rollout:
    """Storage for the config's rollouts: on ``device``, observations where the config says."""
    shapes = {key: (array.shape, getattr(torch, array.dtype)) for key, array in spec.obs.items()}
    row = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    return empty_rollout(
        shapes,
        num_steps=config.ppo.rollout_steps,
        num_envs=config.env.num_envs,
        num_branches=len(spec.action_nvec),
        state_size=state_size,
        device=device,
        obs_device=storage_device(config.storage, config.batch_size * row, device),
    )
