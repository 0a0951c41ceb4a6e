"""Files and records that are written whole or not at all, and JSON that may hold anything."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Any

from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.runtime.files import read_file


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """Open a temporary file that is flushed to the disk and renamed to ``path`` at the end.

    A failed or interrupted write leaves the old file as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:
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


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder, which is renamed to ``path`` at the end and replaces a folder there.

    A failed write leaves the old folder as it was.
    """
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of ``path``, in UTF-8."""
    with replacing(path) as file:
        file.write(text.encode())


class AppendFile:
    """Appends records to a file, whole or not at all; those that can't be written yet are kept for the next call."""

    def __init__(self, path: Path, head: bytes = b"") -> None:
        """Take ``path``, which is opened with the first record; ``head`` comes before it."""
        self.path = path
        self._pending = head
        self._file: FileIO | None = None
        self._size = 0  # bytes of whole records in the file

    def append(self, record: bytes) -> None:
        """Append a record.

        Raises:
            OSError: writing failed; the record is pending.
        """
        self._pending += record
        try:
            if self._file is None:
                self._file = FileIO(self.path, "a")
                self._size = os.fstat(self._file.fileno()).st_size
            self._file.truncate(self._size)  # removes what a failed write left of a record
            left = memoryview(self._pending)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self._size += len(self._pending)
        self._pending = b""

    def sync(self) -> None:
        """Write what is pending and flush it to the disk. Raises like `append`."""
        self.append(b"")
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is pending, if that is possible, and close the file. May be called again."""
        if self._file is not None and not self._file.closed:
            with suppress(OSError):
                self.append(b"")
            with suppress(OSError):
                self._file.truncate(self._size)
            self._file.close()


MAX_BYTES = 2**28
"""Of a file. An evaluation of 1,000 episodes has about 0.2 MB."""


class JsonError(InputError):
    """Names the file and what is wrong with it."""


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Read the object in ``path``.

    Raises:
        JsonError: missing, unreadable, no regular file, too large, or not an object that `parse_json` accepts.
    """
    data = read_file(path, ".json", max_bytes, JsonError)
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
        tree = json.loads(data.decode(), parse_int=_number, parse_float=_number, parse_constant=_number)
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


def _number(text: str) -> float:
    if text.lstrip("-").isdecimal():
        if len(text) <= 20 and -(2**63) <= int(text) < 2**63:
            return int(text)
    elif math.isfinite(value := float(text)):
        return value
    raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)} is not a finite number of at most 64 bits")
