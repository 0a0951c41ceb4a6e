"""The two kinds of errors that end a command with one line, and how such a line is kept readable. Imports no torch."""


class InputError(ValueError):
    """Wrong input from a person or a file: one printable line that names it and says what would be right."""

    def __init__(self, message: object) -> None:
        super().__init__(printable(message))


class RunError(RuntimeError):
    """A run cannot go on, though its input was right: failing environments, a full disk, a rank that is gone."""


def printable(text: object) -> str:
    """Escape what cannot be printed in one line, such as line breaks, control characters and lone surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def shorten(text: str, limit: int = 90) -> str:
    """Cut ``text`` to at most ``limit`` characters; the cut is shown."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
