"""Checkpoint files: plain tensors, numbers and strings, written atomically and loaded without executing anything.

A checkpoint is the output of ``torch.save`` and a footer: a line of fixed length with the format's version and the
SHA-256 of everything before it. ``torch.load(path, weights_only=True)`` ignores the footer.
"""

import hashlib
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


class _HashingFile:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def footer(self) -> bytes:
        """Return the footer for what was written so far."""
        return f"\nppo_tbptt checkpoint, format {FORMAT:04d}, sha256 {self._hash.hexdigest()}\n".encode()


def save_checkpoint(path: Path, tree: dict[str, Any]) -> None:
    """Write ``tree`` (dicts, lists, tensors, numbers, strings) to ``path`` atomically.

    Raises:
        OSError: writing failed; an old file at ``path`` is unchanged.
    """
    with replacing(path) as file:
        hashing = _HashingFile(file)
        try:
            torch.save(tree, hashing)  # type: ignore[arg-type]  # needs no other methods
        except RuntimeError as error:  # torch's zip writer raises it while handling the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.write(hashing.footer())


def verify_checkpoint(path: Path) -> None:
    """Check the format and the checksum of a checkpoint.

    Raises:
        CheckpointError: missing, unreadable, not a checkpoint of this package, of another format, or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with path.open("rb") as file:
            _verify(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from error


def _verify(path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size - _FOOTER_LENGTH
    if size <= 0:
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt (empty, or cut short)")
    file.seek(size)
    last = _FOOTER.fullmatch(file.read())
    if last is None:
        raise CheckpointError(f"{path}: not a checkpoint of ppo_tbptt, or cut short (its last line is missing)")
    if int(last[1]) != FORMAT:
        raise CheckpointError(f"{path}: checkpoint format {int(last[1])}; this version reads format {FORMAT}")
    file.seek(0)
    digest = hashlib.sha256()
    while size and (block := file.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    if digest.hexdigest() != last[2].decode():
        raise CheckpointError(f"{path}: damaged (its checksum does not match its contents)")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Verify a checkpoint and load it onto the CPU, executing nothing that it contains (``weights_only=True``).

    Raises:
        CheckpointError: missing, unreadable, not a checkpoint of this package, of another format, or damaged.
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
