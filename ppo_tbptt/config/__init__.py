"""Settings of a run: what there is, where it comes from, and what may change when a run is resumed. Imports no torch."""

from ppo_tbptt.config.schema import (
    SEED_LIMIT,
    Config,
    CoreConfig,
    EnvConfig,
    ModelConfig,
    PPOConfig,
    TrainConfig,
    describe_fields,
    parse_overrides,
)
from ppo_tbptt.config.values import ConfigError, Schedule

__all__ = [
    "SEED_LIMIT",
    "Config",
    "ConfigError",
    "CoreConfig",
    "EnvConfig",
    "ModelConfig",
    "PPOConfig",
    "Schedule",
    "TrainConfig",
    "describe_fields",
    "parse_overrides",
]
