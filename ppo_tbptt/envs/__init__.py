"""Environments: one at a time (`make_env`), or N of them over shared memory (`VectorEnv`). Imports no torch."""

from ppo_tbptt.envs.interface import ArraySpec, EnvError, EnvSpec, Episode, StepResult, WorkerError
from ppo_tbptt.envs.levels import LevelSeeds
from ppo_tbptt.envs.memory_gym import MEMORY_GYM_IDS
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.workers.pool import resolve_workers
from ppo_tbptt.envs.workers.replay import EpisodeJournal
from ppo_tbptt.envs.workers.vector import Restarts, VectorEnv

__all__ = [
    "MEMORY_GYM_IDS",
    "ArraySpec",
    "EnvError",
    "EnvSpec",
    "Episode",
    "EpisodeJournal",
    "LevelSeeds",
    "Restarts",
    "SingleEnv",
    "StepResult",
    "VectorEnv",
    "WorkerError",
    "make_env",
    "resolve_workers",
]
