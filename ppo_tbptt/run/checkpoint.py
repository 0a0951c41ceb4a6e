"""Checkpoint files: plain tensors, numbers and strings, written atomically and loaded without executing anything.

A checkpoint is the output of ``torch.save`` and a footer: a line of fixed length with the format's version and the
SHA-256 of everything before it. ``torch.load(path, weights_only=True)`` ignores the footer.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ppo_tbptt.run.files import replacing
from ppo_tbptt.runtime.errors import InputError

FORMAT = 2
"""Increased whenever an older reader could misunderstand a newer file."""
_FOOTER = re.compile(rb"\nppo_tbptt checkpoint, format (\d{4}), sha256 ([0-9a-f]{64})\n")
_FOOTER_LENGTH = len(b"\nppo_tbptt checkpoint, format 0000, sha256 \n") + 64


class CheckpointError(InputError):
    """One line that names the file and its fault."""


def save_checkpoint(path: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` (dicts, lists, tensors, numbers, strings) to ``path`` atomically.

    Raises:
        OSError: writing failed; an old file at ``path`` is unchanged.
    """
    with replacing(path) as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:  # torch's zip writer raises it while handling the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(f"\nppo_tbptt checkpoint, format {FORMAT:04d}, sha256 {digest}\n".encode())


def verify_checkpoint(path: Path) -> None:
    """Check the format and the checksum of a checkpoint.

    Raises:
        CheckpointError: missing, unreadable, not a checkpoint of this package, of another format, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with path.open("rb") as file:
            fault = _fault(file)
    except OSError as error:
        fault = f"can't be read ({error.strerror})"
    if fault:
        raise CheckpointError(f"{path}: {fault}")


def _fault(file: BinaryIO) -> str:
    size = file.seek(0, os.SEEK_END) - _FOOTER_LENGTH
    if size <= 0:
        return "not a checkpoint of ppo_tbptt (empty, or cut short)"
    file.seek(size)
    last = _FOOTER.fullmatch(file.read())
    if last is None:
        return "not a checkpoint of ppo_tbptt, or cut short (its last line is missing)"
    if int(last[1]) != FORMAT:
        return f"checkpoint format {int(last[1])}; this version reads format {FORMAT}"
    file.seek(0)
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    return "" if digest.hexdigest() == last[2].decode() else "damaged (its checksum does not match its contents)"


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it onto the CPU, executing nothing that it contains (``weights_only=True``).

    Raises like `verify_checkpoint`.
    """
    verify_checkpoint(path)
    return load_verified(path)


def load_verified(path: Path) -> dict[str, Any]:
    """Load a checkpoint that `verify_checkpoint` has just accepted, without hashing it again.

    Raises:
        CheckpointError: unreadable, or not a checkpoint of this package.
    """
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds: bad zip, bad pickle, refused globals, end of file
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt ({type(error).__name__})") from error
    if not isinstance(tree, dict) or not {"config", "agent"} <= tree.keys():
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt (no config and agent in it)")
    return tree
