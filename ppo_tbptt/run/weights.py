"""Safetensors files with an agent's weights, and in their metadata what is needed to build the agent."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.run.files import parse_json, replacing

SUFFIX = ".safetensors"
FORMAT = "ppo_tbptt weights 1"
"""Changed whenever an older reader could misunderstand a newer file."""


def save_weights(path: Path, weights: dict[str, Tensor], config: Config, spec: EnvSpec, env_steps: int) -> None:
    """Write ``weights`` with the metadata ``format``, ``config`` and ``spec`` (JSON), and ``env_steps``."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "spec": json.dumps(spec.to_json()),
        "env_steps": str(env_steps),
    }
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, metadata)
    with replacing(path) as file:
        file.write(content)


def load_weights(path: Path) -> dict[str, Any]:
    """Load what :func:`save_weights` wrote, as the ``config``, ``spec``, ``agent`` and ``env_steps`` of a checkpoint.

    Raises:
        CheckpointError: unreadable, or not written by this package.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:200]})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: safetensors without {FORMAT!r} as their format; written by ppo-tbptt export?")
    try:
        config, spec = (parse_json(metadata[key].encode()) for key in ("config", "spec"))
        env_steps = int(metadata["env_steps"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata can't be read ({type(error).__name__})") from error
    return {"config": config, "spec": spec, "agent": weights, "env_steps": env_steps}
