"""N environments as one, in this process or in workers, with the same results bit for bit."""

import itertools
import mmap
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ppo_tbptt.envs import channel
from ppo_tbptt.envs.blocks import Blocks
from ppo_tbptt.envs.creation import plain_options
from ppo_tbptt.envs.errors import EnvError, WorkerError
from ppo_tbptt.envs.group import EnvGroup
from ppo_tbptt.envs.pool import WorkerPool, resolve_workers
from ppo_tbptt.envs.spec import EnvSpec, Episode, Observation, StepResult


class VectorEnv:
    """N environments with same-step autoreset.

    An environment that finishes is reset in the same step with the seed handed to that step: `obs` then holds the
    first observation of its next episode and `final_obs` the last one of the finished. With seed -1 it becomes idle
    instead: zero observations, reward 0, no flags, actions ignored, until the next `reset`.

    spec: what each of them looks like.  num_envs: N.  num_workers: processes, 0 for none.
    obs: the current observations by key, `[N, ...]`, overwritten by each step: copy what is to stay.
    final_obs: likewise; row i holds data only right after a step that terminated or truncated environment i.
    """

    spec: EnvSpec
    obs: Observation
    final_obs: Observation

    def __init__(
        self,
        env_id: str,
        *,
        num_envs: int,
        num_workers: int | Literal["auto"],
        options: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        """Make the environments. See `make_env` for `env_id`, `options` and `max_episode_steps`.

        Raises:
            EnvError: the request cannot be met; the message is one line.
            WorkerError: an environment or a worker failed; the message holds its traceback.
        """
        if num_envs < 1:
            raise EnvError(f"num_envs must be at least 1, not {num_envs}")
        options = plain_options(env_id, options)
        self.num_envs = num_envs
        self.num_workers = resolve_workers(num_workers, num_envs)
        self._pool: WorkerPool | None = None
        self._group: EnvGroup | None = None
        if self.num_workers:
            bounds = [num_envs * worker // self.num_workers for worker in range(self.num_workers + 1)]
            slices = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
            self._pool = WorkerPool(env_id, options, max_episode_steps, slices)
            self.spec, self._blocks = self._pool.spec, self._pool.blocks
        else:
            self._group = EnvGroup(env_id, options, max_episode_steps, range(num_envs))
            self.spec = self._group.spec
            self._blocks = Blocks(self.spec, num_envs, mmap.mmap(-1, Blocks.size(self.spec, num_envs)))
            self._blocks.poison()
            self._group.attach(self._blocks)
        self.obs, self.final_obs = self._blocks.obs, self._blocks.final_obs
        self._nvec = np.array(self.spec.action_nvec, np.int64)
        self._running = self._in_flight = self._closed = False

    def reset(self, seeds: np.ndarray) -> None:
        """Begin an episode in every environment: level seeds i64 [N], -1 to leave one idle. Fills `obs`.

        Raises:
            ValueError: `seeds` has another shape or is not of integers.
            WorkerError: an environment or a worker failed; the vector is closed then.
        """
        self._expect(in_flight=False)
        self._blocks.next_seeds[:] = self._check_seeds(seeds)
        self._run(channel.RESET)
        self._finish()
        self._running = True

    def send(self, action: np.ndarray, next_seeds: np.ndarray) -> None:
        """Start a step without waiting for it: `receive` must follow. Until then nothing of the vector may be read.

        Args:
            action: integers [N, A], each branch counting from 0; rows of idle environments must be in range too.
            next_seeds: integers [N], where environments that finish in this step go on; -1 for idle.

        Raises:
            ValueError: an argument has another shape, dtype or range.
            WorkerError: a worker failed; the vector is closed then.
        """
        self._expect(in_flight=False)
        if not self._running:
            raise RuntimeError("reset the environments before their first step")
        action = np.asarray(action)
        if action.shape != self._blocks.action.shape or action.dtype.kind not in "iu":
            expected = f"integers of shape {self._blocks.action.shape}"
            raise ValueError(f"action must be {expected}, not {action.dtype} of shape {action.shape}")
        if not ((action >= 0) & (action < self._nvec)).all():
            row = int(np.flatnonzero(((action < 0) | (action >= self._nvec)).any(axis=1))[0])
            raise ValueError(f"action {action[row].tolist()} of environment {row} is not below {self.spec.action_nvec}")
        self._blocks.next_seeds[:] = self._check_seeds(next_seeds)
        self._blocks.action[:] = action
        self._run(channel.STEP)
        self._in_flight = True

    def receive(self) -> StepResult:
        """Wait for the step that `send` started.

        Raises:
            WorkerError: an environment or a worker failed; the vector is closed then.
        """
        self._expect(in_flight=True)
        self._in_flight = False
        episodes = self._finish()
        blocks = self._blocks
        return StepResult(blocks.reward.copy(), blocks.terminated.copy(), blocks.truncated.copy(), episodes)

    def step(self, action: np.ndarray, next_seeds: np.ndarray) -> StepResult:
        """`send` and `receive`."""
        self.send(action, next_seeds)
        return self.receive()

    def close(self) -> None:
        """End the workers. Harmless when repeated; happens by itself when the vector or the process ends."""
        if not self._closed:
            self._closed = True
            if self._pool:
                self._pool.close()
            if self._group:
                self._group.close()

    def __enter__(self) -> "VectorEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids if self._pool else []

    def _run(self, command: bytes) -> None:
        self._command = command
        if self._pool:
            with _closing_on_failure(self):
                self._pool.send(command)

    def _finish(self) -> list[Episode]:
        with _closing_on_failure(self):
            if self._pool:
                return self._pool.receive()
            assert self._group is not None
            if self._command == channel.STEP:
                return self._group.step()
            self._group.reset()
            return []

    def _expect(self, *, in_flight: bool) -> None:
        if self._closed:
            raise WorkerError(f"the environments of {self.spec.env_id} are closed")
        if self._in_flight != in_flight:
            raise RuntimeError("receive() needs a send() before it" if in_flight else "a step is under way: receive()")

    def _check_seeds(self, seeds: np.ndarray) -> np.ndarray:
        seeds = np.asarray(seeds)
        if seeds.shape != (self.num_envs,) or seeds.dtype.kind not in "iu":
            raise ValueError(f"seeds must be integers of shape ({self.num_envs},), not {seeds.dtype} {seeds.shape}")
        return seeds


class _closing_on_failure:
    """Close the vector if its environments or workers fail: what is left of it is of no use."""

    def __init__(self, vector: VectorEnv) -> None:
        self._vector = vector

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._vector.close()
