"""Settings of a run: what there is, where they come from, what may change on resume. Imports no torch."""

from functools import partial

from ppo_tbptt.config import fields
from ppo_tbptt.config.load import ConfigError
from ppo_tbptt.config.schema import (
    REGULARIZED,
    SEED_LIMIT,
    Config,
    CoreConfig,
    CurriculumConfig,
    EnvConfig,
    ModelConfig,
    PPOConfig,
    Schedule,
    TrainConfig,
    UserCoreConfig,
)

describe_fields = partial(fields.describe_fields, Config)
keys_marked = partial(fields.keys_marked, Config)

__all__ = [
    "REGULARIZED",
    "SEED_LIMIT",
    "Config",
    "ConfigError",
    "CoreConfig",
    "CurriculumConfig",
    "EnvConfig",
    "ModelConfig",
    "PPOConfig",
    "Schedule",
    "TrainConfig",
    "UserCoreConfig",
    "describe_fields",
    "keys_marked",
]
