"""Environments: one at a time (`make_env`), or N of them behind `BatchedEnv` (`VectorEnv`). Imports no torch."""

from ppo_tbptt.envs.interface import (
    ArraySpec,
    BatchedEnv,
    EnvError,
    EnvSpec,
    Episode,
    FaultBudget,
    StepResult,
    WorkerError,
)
from ppo_tbptt.envs.levels import Curriculum, LevelSeeds, LevelSource
from ppo_tbptt.envs.memory_gym import MEMORY_GYM_IDS
from ppo_tbptt.envs.previous import PreviousInputs
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.envs.workers.vector import VectorEnv

__all__ = [
    "MEMORY_GYM_IDS",
    "ArraySpec",
    "BatchedEnv",
    "Curriculum",
    "EnvError",
    "EnvSpec",
    "Episode",
    "FaultBudget",
    "LevelSeeds",
    "LevelSource",
    "PreviousInputs",
    "SingleEnv",
    "StepResult",
    "VectorEnv",
    "WorkerError",
    "make_env",
    "resolve_workers",
]
