"""What toy environments share: options with defaults, and their own check of them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np


class ToyEnv(gym.Env[Any, Any]):
    """An environment whose reset takes the options that `default_reset_parameters` lists, all of them numbers.

    headline: the measure it is judged by, with its largest value (None: unbounded).
    options: the ones of this episode, complete.
    t: steps taken in this episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's declaration)
    default_reset_parameters: ClassVar[dict[str, Any]] = {}
    minimum: ClassVar[float] = 1
    headline: tuple[str, float | None] = ("return", None)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.options = dict(self.default_reset_parameters)
        self.t = 0

    @classmethod
    def process_reset_params(cls, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """The defaults updated by `options`.

        Raises:
            ValueError: one is unknown, no number, or below the class's `minimum`.
        """
        complete = dict(cls.default_reset_parameters)
        for key, value in (options or {}).items():
            if key not in complete:
                raise ValueError(f"unknown option {key!r}, existing ones: {', '.join(complete)}")
            if not isinstance(value, int | float) or not value >= cls.minimum:
                raise ValueError(f"{key} must be a number and at least {cls.minimum}, not {value!r}")
            complete[key] = value
        return complete

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; subclasses draw it in `begin`."""
        super().reset(seed=seed)
        self.options = self.process_reset_params(options)
        self.t = 0
        self.begin(seed)
        return self.observe(), {}

    def begin(self, seed: int | None) -> None:
        """Draw an episode from `np_random`, or from `seed` itself."""

    def observe(self) -> Any:
        """The observation of the present state."""
        raise NotImplementedError


def vector_box(size: int) -> gym.spaces.Box:
    """Unbounded float32 vectors of `size` numbers."""
    return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)


def vector(*values: float | int | bool) -> np.ndarray:
    """f32 [len(values)]."""
    return np.array(values, np.float32)
