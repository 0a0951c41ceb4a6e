"""How jaxtyping's import hook checks the package while it is tested (see `addopts` in pyproject.toml)."""

from typing import Any, Self

from beartype import BeartypeConf, FrozenDict, beartype

# An int will do for a float, as it does for pyright. `Self` has no meaning to beartype in a method that is decorated by
# itself, as the hook does it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any})))
