"""An agent from a config and an environment's spec."""

import torch

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.runtime.device import prepare_precision
from ppo_tbptt.envs import EnvError, EnvSpec
from ppo_tbptt.models.agent import Agent


def build_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent:
    """On ``device``, in the config's precision, for which the process is prepared.

    Raises:
        ConfigError: a network that does not fit the environment.
    """
    try:
        agent = Agent(
            {key: array.shape for key, array in spec.obs.items()},
            spec.action_nvec,
            core=config.core.kind,
            core_hidden_size=config.core.hidden_size,
            num_layers=config.core.num_layers,
            dropout=config.core.dropout,
            hidden_size=config.model.hidden_size,
            cnn_channels=config.model.cnn_channels,
            cnn_features=config.model.cnn_features,
            vector_hidden_sizes=config.model.vector_hidden_sizes,
            precision=prepare_precision(config.precision, device),
        )
    except ValueError as error:
        raise ConfigError(f"env.id: {spec.env_id!r}: {error}") from error
    return agent.to(device)


def check_fits(agent: Agent, spec: EnvSpec) -> None:
    """Raises:
    EnvError: the environment's observations or actions are not those that the agent was built for.
    """
    shapes = {key: array.shape for key, array in spec.obs.items()}
    if shapes != agent.obs_shapes or spec.action_nvec != agent.action_nvec:
        raise EnvError(
            f"{spec.env_id}: observations {shapes} and {spec.action_nvec} actions don't fit this agent, which was "
            f"trained on {agent.obs_shapes} and {agent.action_nvec}"
        )
