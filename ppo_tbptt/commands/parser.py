"""Command lines: one-line errors, and config fields beside a command's own options."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ppo_tbptt.config import describe_fields
from ppo_tbptt.config.fields import shown
from ppo_tbptt.runtime.errors import InputError, shorten

FIGURES = (".png", ".svg", ".pdf")
"""What a figure's file can end in."""
CONFIG_HELP = "a TOML file, or one of the package's configs by name, such as quickstart or cpu/mortar_mayhem_grid"
RUN_HELP = "a run's folder, or an agent's folder or name (ppo-tbptt agents)"


class UsageError(InputError):
    """Says what is wrong with the command line."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line instead of printing the usage."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(prog=f"ppo-tbptt {command}", description=description, epilog=epilog, allow_abbrev=False)
        self._takes_value = {"-h": False, "--help": False}

    def option(self, name: str, *, help: str, **kwargs: object) -> None:
        """Add an option with one value, or with none (``action="store_true"``)."""
        self._takes_value[name] = "action" not in kwargs
        self.add_argument(name, help=help, **kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` instead of printing the usage."""
        raise UsageError(f"{self.prog}: {shorten(message, 300)} (see --help)")

    def parse_with_overrides(self, argv: Sequence[str], *, only: str = "") -> tuple[argparse.Namespace, dict[str, str]]:
        """Parse the command's own arguments and ``--config.field VALUE`` (those that begin with ``only`` alone).

        ``argparse.parse_known_args`` would take the value of an unknown option for a positional argument.
        """
        own, overrides = split_overrides(argv, self._takes_value)
        for key in overrides:
            if not key.startswith(only):
                raise UsageError(f"{key}: can't be changed for a trained agent; only --{only}* can")
        return self.parse_args(own), overrides


def split_overrides(argv: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[list[str], dict[str, str]]:
    """Split ``["CONFIG", "--ppo.learning-rate", "1e-4"]`` into ``["CONFIG"]`` and ``{"ppo.learning_rate": "1e-4"}``.

    Options in ``takes_value`` are a command's own and stay, joined with their values.

    Raises:
        UsageError: an option without a value, or a setting that is no key or is given twice.
    """
    own: list[str] = []
    overrides: dict[str, str] = {}
    tokens = iter(argv)
    for token in tokens:
        name, equals, value = token.partition("=")
        if not token.startswith("--") or not takes_value.get(name, True):
            own.append(token)
            continue
        place, key = f"command line: {shorten(name)}", name.removeprefix("--").replace("-", "_")
        value = value if equals else next(tokens, "--")
        if value == "--" or (not equals and value.startswith("--")):
            types = [field.type for field in describe_fields() if field.key == key]
            raise UsageError(f"{place}: has no value; must be {(*types, '--key value, or --key=value')[0]}")
        if name in takes_value:
            own.append(f"{name}={value}")
        elif not re.fullmatch(r"\w[^\s.]*(\.[^\s.]+)*", key):
            raise UsageError(f"{place}: not a key; must be --key value, or --key=value")
        elif key in overrides:
            raise UsageError(f"{place}: given twice, now as {shown(value)}; must be given once")
        else:
            overrides[key] = value
    return own, overrides


def check_target(option: str, path: Path | None, suffixes: Sequence[str] = (), *, makes_folder: bool = False) -> None:
    """Check, before any work is done for it, that a file can be written there and replaces at most a file.

    Raises:
        UsageError: it ends in none of ``suffixes`` (in small letters or capitals), where there are any; there is no
            such folder, unless the command makes it; nothing can be written in it, or what is there is no file.
    """
    if path is None:
        return
    name = path.name.lower()
    if suffixes and not any(name.endswith(suffix) and name != suffix for suffix in suffixes):
        legal = " or ".join(", ".join(suffixes).rsplit(", ", 1))
        raise UsageError(f"{option} {path}: must end in {legal}")
    problem = ""
    try:
        if not path.parent.is_dir():
            problem = "" if makes_folder else f"there is no folder {path.parent}"
        elif path.exists() and not path.is_file():
            problem = f"is {'a folder' if path.is_dir() else 'not a regular file'}; must be a file to write"
        elif not os.access(path.parent, os.W_OK):
            problem = f"can't write in the folder {path.parent}"
    except OSError as error:
        problem = str(error.strerror)
    if problem:
        raise UsageError(f"{option} {path}: {problem}")


def integer_from(least: int) -> Callable[[str], int]:
    """Make a ``type=`` that reads an integer from ``least`` to 2**31 - 1."""

    def integer(text: str) -> int:
        value = int(text)
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least} and at most {2**31 - 1}")
        return value

    return integer


positive, seed = integer_from(1), integer_from(0)


def minutes(text: str) -> float:
    """Read a time in minutes, above 0, for ``type=``."""
    value = float(text)
    if not 0 < value < 1e7:
        raise argparse.ArgumentTypeError(f"{value} is not a time in minutes; must be above 0")
    return value
