"""Settings of a run: what there is, where they come from, what may change on resume. Imports no torch."""

from ppo_tbptt.config.load import ConfigError
from ppo_tbptt.config.schema import (
    SEED_LIMIT,
    Config,
    CoreConfig,
    EnvConfig,
    ModelConfig,
    PPOConfig,
    Schedule,
    TrainConfig,
    UserCoreConfig,
    describe_fields,
    keys_marked,
    parse_overrides,
)

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
    "UserCoreConfig",
    "describe_fields",
    "keys_marked",
    "parse_overrides",
]
