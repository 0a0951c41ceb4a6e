"""Configs that train in a second."""

from typing import Any

from ppo_tbptt.config import Config

TINY: dict[str, Any] = {
    "total_steps": 256,
    "device": "cpu",
    "env": {"id": "ppo_tbptt/PocMemory-v0", "num_envs": 4, "num_workers": 0},
    "model": {"hidden_size": 16, "vector_hidden_sizes": [16]},
    "core": {"kind": "gru", "hidden_size": 8},
    "ppo": {"rollout_steps": 16, "sequence_length": 8, "num_epochs": 2, "num_minibatches": 2, "learning_rate": 1e-3},
    "train": {"checkpoint_every": 2, "eval_num_seeds": 4, "eval_repeats": 2, "keep_checkpoints": 2, "video_every": 0},
}


def tiny(**changes: Any) -> Config:
    return Config.from_dict(TINY).replace(**changes)
