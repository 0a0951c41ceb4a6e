"""The two ways in which environments fail: by the user's request, or by themselves."""

import difflib
from collections.abc import Iterable


class EnvError(ValueError):
    """The request cannot be met: unknown id, unsupported space, unknown or impossible reset option.

    The message is one line that says what to change.
    """


class WorkerError(RuntimeError):
    """An environment raised, returned something that is not a number, or a worker process died.

    The message names the environment and its level seed, and ends with the traceback where there is one.
    """


def one_line(text: object) -> str:
    """`text` with every run of white space, line breaks included, as a single space."""
    return " ".join(str(text).split())


def suggestion(wrong: str, known: Iterable[str]) -> str:
    """` Did you mean 'a' or 'b'?` for up to three close matches of `wrong` in `known`, else an empty string."""
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
