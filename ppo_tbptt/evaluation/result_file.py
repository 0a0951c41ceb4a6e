"""Evaluations as they lie in a run's folder: a file may hold anything."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, Strict, model_validator

from ppo_tbptt.config.fields import shown
from ppo_tbptt.config.load import Problem, validate
from ppo_tbptt.run.files import JsonError, read_json
from ppo_tbptt.runtime.errors import InputError


class _Measure(BaseModel, strict=True):
    mean: float
    ci95: Annotated[tuple[float, float] | None, Strict(False)]


class _Evaluation(BaseModel, strict=True):
    """The keys that are read; others are left as they are."""

    checkpoint: str
    env_id: str
    env_steps: int
    episodes: int
    seeds: list[int] = Field(min_length=1)
    repeats: int
    greedy: bool
    sampling_seed: int
    max_steps: int
    forget_every: int | None
    capped: int
    headline: str
    headline_without_memory: float | None = None
    measures: dict[str, _Measure]

    @model_validator(mode="after")
    def _check(self) -> "_Evaluation":
        if self.headline not in self.measures:
            raise Problem(("headline",), f"{shown(self.headline)} is not allowed; must be one of the measures")
        return self


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read what `train`, `evaluate` or `probe` wrote to ``path``; all that is read of it is there and of its type.

    Raises:
        JsonError: it can't be read, or a value in it is missing or can't be.
    """
    try:
        tree = read_json(path)
        validate(_Evaluation, tree, f"{path}")
    except InputError as error:
        raise JsonError(f"{error}, as `evaluate` writes it; delete it, or move it elsewhere") from None
    return tree
