"""The package's own configs, by name: ``quickstart``, ``cpu/mortar_mayhem_grid``. Wheels hold them in the package."""

import difflib
import os
from pathlib import Path

from ppo_tbptt.config.load import ConfigError
from ppo_tbptt.runtime.errors import shorten

_PACKAGE = Path(__file__).parents[1]
CONFIGS = next(filter(Path.is_dir, (_PACKAGE / "configs", _PACKAGE.parent / "configs")), _PACKAGE / "configs")
"""In an installed package, or at the top of a checkout."""


def config_names() -> list[str]:
    """List the names of the package's configs."""
    return sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.toml"))


def config_file(source: str) -> str:
    """Return the file that ``source`` is, or where there is no such file, that of the config with this name.

    A folder that happens to have the name of a config does not hide it.

    Raises:
        ConfigError: there is neither. A missing file with the suffix ``.toml``, or in a folder that exists, is left to
            who reads it.
    """
    names, name = config_names(), source.removesuffix(".toml").removeprefix("configs/")
    if os.path.lexists(source) and not (os.path.isdir(source) and source in names):
        return source
    if source in names:
        return str(CONFIGS / f"{source}.toml")
    if name in names:
        raise ConfigError(f"{source}: no such file; did you mean the package's config {name}?")
    if not source or source.endswith(".toml") or os.path.isdir(os.path.dirname(source)):
        return source
    near = ", ".join(difflib.get_close_matches(name[:120], names, 3, cutoff=0.0))
    raise ConfigError(f"{shorten(source)}: no such file, nor a config of the package; the nearest are {near}")
