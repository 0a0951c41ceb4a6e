"""Command lines: one-line errors, and config fields beside a command's own options."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from ppo_tbptt.config import parse_overrides
from ppo_tbptt.runtime.errors import InputError, shorten

FIGURES = (".png", ".svg", ".pdf")
"""What a figure's file can end in."""


class UsageError(InputError):
    """Says what is wrong with the command line."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line instead of printing the usage."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(prog=f"ppo-tbptt {command}", description=description, epilog=epilog, allow_abbrev=False)
        self._arity: dict[str, int] = {"-h": 0, "--help": 0}

    def option(self, name: str, *, help: str, **kwargs: object) -> None:
        """Add an option with one value, or with none (``action="store_true"``)."""
        self._arity[name] = 0 if "action" in kwargs else 1
        self.add_argument(name, help=help, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` instead of printing the usage."""
        raise UsageError(f"{self.prog}: {shorten(message, 300)} (see --help)")

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Separate the command's own arguments from the ``--config.field VALUE`` tokens, in their order.

        ``argparse.parse_known_args`` would take the value of an unknown option for a positional argument.
        """
        own: list[str] = []
        overrides: list[str] = []
        tokens = list(argv)
        while tokens:
            token = tokens.pop(0)
            name, equals, value = token.partition("=")
            is_own = not token.startswith("--") or name in self._arity
            target = own if is_own else overrides
            target.append(token)
            takes_value = self._arity.get(name, 0) if is_own else 1
            if takes_value and not equals and tokens:
                value = tokens.pop(0)
                target.append(value)
            if is_own and takes_value and value == "--":  # argparse would make an empty list of it
                self.error(f"argument {name}: has no value")
        return self.parse_args(own), overrides


def env_overrides(tokens: Sequence[str]) -> dict[str, str]:
    """Read ``--env.FIELD VALUE`` tokens, for commands that play with a trained agent: nothing else can change for it.

    Raises:
        ConfigError, UsageError: an unknown field, or one of another table.
    """
    overrides = parse_overrides(tokens)
    for key in overrides:
        if not key.startswith("env."):
            raise UsageError(f"{key}: can't be changed for a trained agent; only --env.* can")
    return overrides


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Report errors in writing the file that ``option`` names.

    Raises:
        UsageError: it can't be written.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{option} {path}: can't be written ({error.strerror})") from error


def check_suffix(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Check the ending of the file that ``option`` names, in small letters or capitals.

    Raises:
        UsageError: it is none of ``suffixes``.
    """
    name = path.name.lower()
    if not any(name.endswith(suffix) and name != suffix for suffix in suffixes):
        *others, last = suffixes
        legal = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(f"{option} {path}: must end in {legal}")


def check_target(option: str, path: Path | None, suffixes: Sequence[str] = ()) -> None:
    """Check, before any work is done for it, that a file can be written there and replaces at most a file.

    Raises:
        UsageError: it ends in none of ``suffixes``, where there are any; there is no such folder, nothing can be
            written in it, or what is there is no file.
    """
    if path is None:
        return
    if suffixes:
        check_suffix(option, path, suffixes)
    try:
        problem = _problem(path)
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise UsageError(f"{option} {path}: {problem}")


def _problem(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if path.exists() and not path.is_file():
        return f"is {'a folder' if path.is_dir() else 'not a regular file'}; must be a file to write"
    return "" if os.access(path.parent, os.W_OK) else f"can't write in the folder {path.parent}"


def positive(text: str) -> int:
    """Read an integer from 1 to 2**31 - 1, for ``type=``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small; must be at least 1")
    if value >= 2**31:
        raise argparse.ArgumentTypeError(f"{value} is too large; must be at most {2**31 - 1}")
    return value


def minutes(text: str) -> float:
    """Read a time in minutes, above 0, for ``type=``."""
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{value} is not a time in minutes; must be above 0")
    return value


def seed(text: str) -> int:
    """Read an integer from 0 to 2**31 - 1, for ``type=``."""
    value = int(text)
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not a seed; must be from 0 to {2**31 - 1}")
    return value
