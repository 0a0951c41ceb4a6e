"""Checkpoints: plain tensors, numbers and strings in one file, written whole or not at all, never unpickled blindly."""

from pathlib import Path
from typing import Any

import torch

from ppo_tbptt.files import replacing

FORMAT = 1
"""Raised whenever an older reader could misunderstand a newer file."""


class CheckpointError(ValueError):
    """One line that names the file and what is wrong with it."""


def save_checkpoint(path: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` (dicts, lists, tensors, numbers, strings) to ``path``.

    A failed or interrupted write leaves the old file as it was.
    """
    with replacing(path) as file:
        torch.save({"format": FORMAT, **tree}, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, executing nothing that it contains (``weights_only=True``).

    Raises:
        CheckpointError: missing, unreadable, not a checkpoint of this package, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: bad zip, bad pickle, refused globals, end of file
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt ({type(error).__name__})") from error
    if not isinstance(tree, dict) or not {"format", "config", "agent"} <= tree.keys():
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt (no format, config and agent in it)")
    if tree["format"] != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {tree['format']!r}; this version reads format {FORMAT}")
    return tree
