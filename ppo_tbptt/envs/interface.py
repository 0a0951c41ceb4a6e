"""The environment interface: specs, episodes, errors, and `BatchedEnv`, behind which environments run anywhere."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Self, TypeAlias

import numpy as np

from ppo_tbptt.runtime.errors import InputError, RunError


class EnvError(InputError):
    """The request cannot be met: unknown id, unsupported space, impossible option. One line says what to change."""


class WorkerError(RunError):
    """An environment raised or returned what is no number, or a worker process died; with the traceback if any."""


Observation = dict[str, np.ndarray]
"""One observation by key, or `[N, ...]` of them. A Box observation lies under the single key `"obs"`."""

Array: TypeAlias = Any
"""A NumPy array, or a torch tensor on any device (this package imports no torch)."""


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
        """Convert to plain dicts, lists, strings and numbers; `from_json` gives an equal spec back."""
        obs = [[key, list(array.shape), array.dtype] for key, array in self.obs.items()]
        return {**asdict(self), "action_nvec": list(self.action_nvec), "obs": obs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EnvSpec":
        """Invert `to_json`."""
        obs = {key: ArraySpec(shape=tuple(shape), dtype=dtype) for key, shape, dtype in data["obs"]}
        return cls(**{**data, "action_nvec": tuple(int(n) for n in data["action_nvec"]), "obs": obs})


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode.

    index: its environment's row in the batch, -1 outside of one.
    seed: the level seed it was reset with.
    ret: sum of its rewards, undiscounted.
    length: number of steps.
    terminated: False if it was truncated.
    measures: figures by this package's own definitions, comparable between runs.
    env: the environment's own figures, as they stood in the last step's info.
    stage: the curriculum's stage whose options it was reset with, counted from 1; 0 for the task's own options.
    step: the step of the rollout that it ended in, 0 outside of one.
    """

    index: int
    seed: int
    ret: float
    length: int
    terminated: bool
    measures: dict[str, float]
    env: dict[str, float]
    stage: int = 0
    step: int = 0

    def values(self) -> list[Any]:
        """Return the fields' values in order, of which `Episode(*values)` is made; `dataclasses.astuple` is slow."""
        return [getattr(self, name) for name in self.__slots__]


@dataclass(slots=True)
class FaultBudget:
    """How many faults of environments and worker processes are survived; several batches may share one.

    count: faults so far.
    """

    maximum: int = 0
    count: int = 0

    def spend(self, error: Exception, remedy: str) -> str:
        """Count a fault, and describe it and its remedy in a line, with the traceback below it where there is one.

        Raises:
            WorkerError, EnvError: `error`, with the number of faults in its message, when the budget is spent.
        """
        if self.count >= self.maximum:
            if not self.maximum:
                raise error
            count = f"after {self.count} restarts, of which a run may have {self.maximum}"
            raise WorkerError(f"{error}\n({count})") from None
        self.count += 1
        first, *traceback = str(error).strip().splitlines()
        return "\n".join([f"{first.rstrip(':')}; {remedy} ({self.count} of at most {self.maximum})", *traceback])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of one step of a group of n environments.

    reward f32 [n], terminated, truncated bool [n]: the caller's to keep.
    final_obs: by key, [n, ...]; the last observation of the episode where one ended, overwritten by the next step.
    episodes: those that ended, by index. Without those that a fault ended.
    failed: bool [n], the environments that could not take the step. Their episodes are truncated with it: reward 0, and
        their last observations are those which the step was sent for, not in `final_obs`. None where all is well.
    faults: a text for each fault since the last result.
    """

    reward: Any
    terminated: Any
    truncated: Any
    final_obs: Mapping[str, Array]
    episodes: list[Episode]
    failed: Any = None
    faults: tuple[str, ...] = ()


class BatchedEnv(ABC):
    """N environments of one kind with same-step autoreset.

    An environment whose episode ends begins the next one in the same step, with a level that it draws by itself. One
    whose levels have run out is idle: zero observations, reward 0, no flags, actions ignored.

    spec: what each environment looks like.
    num_envs: N.
    groups: the rows of each group. A group is sent and received on its own, so that one can step while the agent acts
        for the other.
    obs: current observations by key, [N, ...], overwritten by each step of their group: copy what is to stay.
    hashes: of the images among `obs`, by key, u64 [N, 2]: equal for equal images. None of those that are not hashed.
    host_memory: u8 [bytes], host memory in which `obs` lies as long as this exists; it may be page-locked. None where
        there is none.
    where: where the environments run, for the user, such as "in 2 workers".
    """

    spec: EnvSpec
    num_envs: int
    groups: tuple[slice, ...]
    obs: Mapping[str, Array]
    hashes: Mapping[str, np.ndarray] = MappingProxyType({})
    host_memory: np.ndarray | None = None
    where: str = ""

    @abstractmethod
    def reset(self) -> Mapping[str, Array]:
        """Begin an episode of its next level in every environment, and return `obs`."""

    @abstractmethod
    def send(self, action: Array, group: int = 0) -> None:
        """Start a step of a group; `receive` of the same group must follow.

        Args:
            action: integers [n, A], each branch counting from 0, on the device of `obs`; also for idle environments.
            group: its index. Its rows must not be read until the step is received.
        """

    @abstractmethod
    def receive(self, group: int = 0) -> StepResult:
        """Wait for the step that `send` started.

        Raises:
            WorkerError: an environment failed and no more faults are survived; the batch is closed then.
        """

    def step(self, action: Array, group: int = 0) -> StepResult:
        """`send` and `receive`."""
        self.send(action, group)
        return self.receive(group)

    @abstractmethod
    def state_dict(self) -> dict[str, Array]:
        """Arrays that `load_state_dict` needs, without the level source's; empty where that is not offered."""

    @abstractmethod
    def load_state_dict(
        self, state: Mapping[str, Array], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """Go on where `state` was taken, and fill `obs`; where that fails, begin an episode of the next level.

        Args:
            state: what `state_dict` returned, here or in another batch of as many environments.
            progress: called with the number of environments that are done, and N.

        Returns bool [N], True where the environment is exactly where it was.

        Raises:
            ValueError: `state` is of another number of environments or of another kind.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything. Harmless when repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
