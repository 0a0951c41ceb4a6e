"""Recurrent PPO with truncated backpropagation through time, for memory tasks such as MemoryGym's."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppo_tbptt.config import Config as Config
    from ppo_tbptt.evaluation.evaluate import evaluate as evaluate
    from ppo_tbptt.evaluation.policy import Policy as Policy
    from ppo_tbptt.training.trainer import Trainer as Trainer

_WHERE = {
    "Config": "config",
    "Trainer": "training.trainer",
    "evaluate": "evaluation.evaluate",
    "Policy": "evaluation.policy",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that worker processes, which need the environments only, never import torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_WHERE)
