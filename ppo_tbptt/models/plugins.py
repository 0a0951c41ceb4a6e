"""What a config names as ``module:name``: cores and losses from modules of the user's own."""

from importlib import import_module
from operator import attrgetter
from typing import Any

import torch

from ppo_tbptt.config import ConfigError

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Never an error of the plug-in, the compiler or the file that was at work when memory ran out."""


def load_plugin(key: str, name: str, known: Any) -> Any:
    """Import the class or function ``name``.

    Args:
        key: option of the config that holds the name, for errors.
        name: ``module:name``.
        known: names that are built in, for errors.

    Raises:
        ConfigError: not of that form, or the module can't be imported or has no such name.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        builtin = ", ".join(known) or "none"
        raise ConfigError(f"{key}: {name!r} is unknown; must be module:name or built in ({builtin})")
    try:
        return attrgetter(attribute)(import_module(module))
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # a module may raise anything while it is imported
        raise ConfigError(f"{key}: {name!r}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Return the kind of an error and what it says, on one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
