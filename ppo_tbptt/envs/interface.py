"""What an environment looks like from outside: its arrays, its actions, its episodes."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from ppo_tbptt.runtime.errors import InputError, RunError


class EnvError(InputError):
    """The request cannot be met: unknown id, unsupported space, unknown or impossible reset option.

    The message is one line that says what to change.
    """


class WorkerError(RunError):
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


Observation = dict[str, np.ndarray]
"""One observation by key, or `[N, ...]` of them. A Box observation lies under the single key `"obs"`."""

SUPPORTED_OBSERVATIONS = (
    "Box of uint8 and shape (height, width, channels), Box of numbers and shape (n,), or a Dict of such boxes"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArraySpec:
    """Shape of one observation array, without the environment axis, and its dtype: `"uint8"` or `"float32"`."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvSpec:
    """What an agent needs to know about an environment.

    env_id: the id as it was asked for, `module:` prefix included.
    obs: arrays of one observation, in the environment's order of keys; `"obs"` alone for a Box observation.
    action_nvec: number of choices per action branch; choices count from 0 whatever the environment counts from.
    discrete: the environment wants a plain int (one branch) instead of an array.
    headline: the measure this task is judged by, a key of `Episode.measures`, or `"return"`.
    headline_max: the largest value `headline` can take, None if unbounded or unknown.
    max_episode_steps: the limit that truncates episodes, None without one. Limits which an environment keeps to
        itself and reports as terminations (MemoryGym's `max_steps`) do not count.
    """

    env_id: str
    obs: dict[str, ArraySpec]
    action_nvec: tuple[int, ...]
    discrete: bool
    headline: str
    headline_max: float | None
    max_episode_steps: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; `from_json` gives an equal spec back."""
        data = asdict(self)
        data["action_nvec"] = list(self.action_nvec)
        data["obs"] = [[key, list(array.shape), array.dtype] for key, array in self.obs.items()]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EnvSpec":
        """The spec that `to_json` described."""
        fields = dict(data)
        fields["action_nvec"] = tuple(int(n) for n in fields["action_nvec"])
        fields["obs"] = {key: ArraySpec(shape=tuple(shape), dtype=dtype) for key, shape, dtype in fields["obs"]}
        return cls(**fields)


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode.

    index: its environment's place in the vector, -1 outside of a vector.
    seed: the level seed it was reset with.
    ret: sum of its rewards, undiscounted.
    length: number of steps.
    terminated: False if it was cut by a time limit.
    measures: figures by this package's own definitions, comparable between runs.
    env: the environment's own figures, as they stood in the last step's info.
    """

    index: int
    seed: int
    ret: float
    length: int
    terminated: bool
    measures: dict[str, float]
    env: dict[str, float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one step of N environments: `reward` f32 [N], `terminated`, `truncated` bool [N], `episodes` by index.

    lost: bool [N], the environments that did not take the step because they or their worker failed, with their
        episodes gone: no reward, no flag. None, as nearly always, where all is well. See `VectorEnv.restart`.

    The arrays are the caller's to keep.
    """

    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    episodes: list[Episode]
    lost: np.ndarray | None = None


def observation_specs(space: gym.Space[Any], env_id: str) -> dict[str, ArraySpec]:
    """Arrays of an observation space.

    Raises:
        EnvError: the space is neither a supported Box nor a Dict of them.
    """
    if isinstance(space, spaces.Dict):
        return {str(key): _box_spec(box, env_id, f"observation {key!r}") for key, box in space.spaces.items()}
    return {"obs": _box_spec(space, env_id, "the observation")}


def _box_spec(space: gym.Space[Any], env_id: str, name: str) -> ArraySpec:
    if isinstance(space, spaces.Box):
        shape = tuple(int(size) for size in space.shape)
        if len(shape) == 3 and space.dtype == np.uint8:
            return ArraySpec(shape=shape, dtype="uint8")
        if len(shape) == 1 and np.issubdtype(space.dtype, np.number):
            return ArraySpec(shape=shape, dtype="float32")
        found = f"a Box of {space.dtype} and shape {shape}"
    else:
        found = f"a {type(space).__name__}"
    raise EnvError(f"{env_id}: {name} is {found}; supported: {SUPPORTED_OBSERVATIONS}")


def action_spec(space: gym.Space[Any], env_id: str) -> tuple[tuple[int, ...], bool, np.ndarray]:
    """Number of choices per branch, whether a plain int is wanted, and the first choice per branch (i64 [A]).

    Raises:
        EnvError: the space is neither Discrete nor a MultiDiscrete of rank one.
    """
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), True, np.array([space.start], np.int64)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)), np.int64)
        return tuple(int(n) for n in space.nvec), False, start
    found = f"{type(space).__name__} of shape {space.shape}"
    raise EnvError(f"{env_id}: the action space is {found}; supported: Discrete, or MultiDiscrete of rank one")
