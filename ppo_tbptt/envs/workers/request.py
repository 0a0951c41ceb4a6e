"""What is asked for when environments are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class EnvRequest:
    """The arguments that every environment of a vector is made with; plain enough for JSON. See `make_env`.

    journal: keep a journal of every episode under way.
    """

    env_id: str
    options: Mapping[str, Any] | None
    max_episode_steps: int | None
    journal: bool
