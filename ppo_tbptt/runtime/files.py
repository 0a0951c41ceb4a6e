"""Reading files that may be anything."""

import difflib
from pathlib import Path

from ppo_tbptt.runtime.errors import InputError


def read_file(path: Path, suffix: str, max_bytes: int, error: type[InputError]) -> bytes:
    """Read a small file, whose name should end in ``suffix``.

    Raises:
        InputError: an ``error``: it is missing, unreadable, too large or no regular file, such as a pipe.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)
            if len(data) <= max_bytes:
                return data
            wrong = f"is larger than {max_bytes:,} bytes"
        elif path.exists():
            wrong = "is a folder" if path.is_dir() else "not a regular file"  # a pipe would never end
        else:
            near = difflib.get_close_matches(path.name[:120], [file.name for file in path.parent.glob(f"*{suffix}")], 1)
            wrong = f"no such file; did you mean {path.with_name(near[0])}?" if near else "no such file"
    except OSError as cause:
        wrong = f"cannot be read: {cause.strerror}"
    raise error(f"{path}: {wrong}; must be a small {suffix} file")
