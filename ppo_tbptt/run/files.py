"""Files that are written whole or not at all."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ppo_tbptt.runtime.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that becomes ``path`` in one step at the end.

    It lies beside ``path`` under a temporary name and is flushed to the disk before it takes the final one: a failed or
    interrupted write leaves the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of ``path``, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


MAX_BYTES = 2**28
"""Of a file. An evaluation of 1,000 episodes has about 0.2 MB."""


class JsonError(InputError):
    """Names the file and what is wrong with it."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read the object in ``path``.

    Raises:
        JsonError: missing, unreadable, no regular file, too large, or not an object that `parse_json` accepts.
    """
    try:
        if not path.is_file():  # a pipe would never end
            raise JsonError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; must be a JSON file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise JsonError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise JsonError(f"{path}: is larger than {max_bytes:,} bytes; must be a small JSON file")
    try:
        return parse_json(data)
    except ValueError as error:
        raise JsonError(f"{path}: {error}") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """Read an object of text, finite numbers (whole ones of at most 64 bits), booleans, null, lists and objects.

    Raises:
        ValueError: anything else, in one line.
    """
    try:
        tree = json.loads(data.decode(), parse_int=_whole, parse_float=_finite, parse_constant=_refuse)
        json.dumps(tree, ensure_ascii=False).encode()  # a lone surrogate can be neither printed nor written
    except UnicodeError:
        raise ValueError("not valid UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"a JSON {type(tree).__name__}; must be an object")
    return tree


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (value := int(text)) < 2**63:
        _refuse(text)
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        _refuse(text)
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is not a finite number of at most 64 bits")
