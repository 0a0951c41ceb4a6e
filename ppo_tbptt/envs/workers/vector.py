"""N environments behind `BatchedEnv`, in this process or in workers, with the same results bit for bit."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np

from ppo_tbptt.envs.interface import Array, BatchedEnv, EnvError, FaultBudget, StepResult, WorkerError
from ppo_tbptt.envs.levels import LevelSource
from ppo_tbptt.envs.make import plain_options
from ppo_tbptt.envs.workers import ipc
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.envs.workers.group import InProcess
from ppo_tbptt.envs.workers.ipc import EnvRequest
from ppo_tbptt.envs.workers.pool import WorkerPool
from ppo_tbptt.envs.workers.replay import EpisodeReplay, pack, unpack
from ppo_tbptt.envs.workers.supervisor import Supervisor


class VectorEnv(BatchedEnv):
    """See `BatchedEnv`. Environments are spread over worker processes, or all live in this one.

    An environment that raises, or gives out what is no number or of another shape, is made anew alone. A process that
    dies or hangs is restarted, and all of its environments fail. Both count against the budget of faults, and so does
    a reset that fails, after which the next level is tried. When the budget is spent the vector is closed.

    num_workers: processes that step at the same time, 0 for none.  worker_pids: all of their process ids.
    """

    def __init__(
        self,
        env_id: str,
        *,
        num_envs: int,
        levels: LevelSource,
        num_workers: int | Literal["auto"] = 0,
        two_groups: bool = False,
        options: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        replay: bool = False,
        step_timeout: float | None = None,
        faults: FaultBudget | None = None,
    ) -> None:
        """Make the environments.

        Args:
            env_id: as of `make_env`, like `options` and `max_episode_steps`.
            options: the environments' reset options.
            max_episode_steps: truncates longer episodes.
            num_envs: N.
            levels: which levels they play.
            num_workers: processes of each group; 0 for none.
            two_groups: split the environments into halves, which depend on N alone.
            replay: record unfinished episodes for `state_dict`.
            step_timeout: seconds after which a worker that does not answer is taken for hung; None: never. Environments
                of this process may take any time.
            faults: how many are survived; none without it.

        Raises:
            EnvError: the request cannot be met; the message is one line.
            WorkerError: an environment or a worker failed; the message holds its traceback.
        """
        if num_envs < 1:
            raise EnvError(f"num_envs must be at least 1, not {num_envs}")
        self.num_envs, self._levels, self._replay = num_envs, levels, replay
        groups = [range(num_envs)]
        if two_groups and num_envs > 1:
            middle = num_envs - num_envs // 2
            groups = [range(middle), range(middle, num_envs)]
        self.groups = tuple(slice(group.start, group.stop) for group in groups)
        self.num_workers = resolve_workers(num_workers, len(groups[0]))
        self.where = _where(len(groups), self.num_workers)
        slices: list[range] = []
        self._workers: list[range] = []  # of each group
        for group in groups:
            parts = _split(group, max(1, resolve_workers(num_workers, len(group))))
            self._workers.append(range(len(slices), len(slices) + len(parts)))
            slices += parts
        request = EnvRequest(env_id, plain_options(env_id, options), max_episode_steps, replay)
        self._pool = WorkerPool(request, slices, step_timeout) if self.num_workers else InProcess(request, slices)
        self._supervisor = Supervisor(self._pool, faults or FaultBudget())
        self.spec, self._blocks = self._pool.spec, self._pool.blocks
        self.obs, self.host_memory = self._blocks.obs, self._blocks.memory
        self._final_obs = [{key: x[rows] for key, x in self._blocks.final_obs.items()} for rows in self.groups]
        self._nvec = np.array(self.spec.action_nvec, np.int64)
        self._next_seeds = np.full(num_envs, -1, np.int64)
        self._idle = np.ones(num_envs, np.bool_)
        self._in_flight: set[int] = set()
        self._running = self._closed = False

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._pool.pids

    def reset(self) -> Mapping[str, np.ndarray]:
        """See `BatchedEnv`.

        Raises:
            WorkerError: a fault that is not survived; the vector is closed then.
        """
        self._expect_idle()
        self._clear_outcomes()
        with _ClosingOnFailure(self):
            self._begin_until_all_play(range(len(self._pool.slices)), set(range(self.num_envs)))
        self._running = True
        return self.obs

    def send(self, action: Array, group: int = 0) -> None:
        """See `BatchedEnv`.

        Raises:
            ValueError: `action` has another shape, dtype or range.
        """
        self._expect_open()
        if not self._running or group in self._in_flight:
            raise RuntimeError("a step is under way: receive()" if self._running else "reset before the first step")
        rows = self.groups[group]
        self._blocks.action[rows] = self._checked(action, rows)
        self._blocks.next_seeds[rows] = self._next_seeds[rows]
        self._in_flight.add(group)
        with _ClosingOnFailure(self):
            for worker in self._workers[group]:
                self._supervisor.send(worker, ipc.STEP)

    def receive(self, group: int = 0) -> StepResult:
        """See `BatchedEnv`."""
        self._expect_open()
        if group not in self._in_flight:
            raise RuntimeError("receive() needs a send() before it")
        self._in_flight.discard(group)
        workers, rows, blocks = self._workers[group], self.groups[group], self._blocks
        failed: np.ndarray | None = None
        with _ClosingOnFailure(self):
            episodes, broken = self._supervisor.outcomes(workers)
            for episode in episodes:
                self._levels.ended(episode.index, episode)
                self._idle[episode.index] = self._begin_level(episode.index) < 0
                self._peek_level(episode.index)
            reward, terminated = blocks.reward[rows].copy(), blocks.terminated[rows].copy()
            truncated = blocks.truncated[rows].copy()
            if broken or self._supervisor.dead:
                ended = {episode.index for episode in episodes}
                lost = self._begin_until_all_play(workers, set(), broken) - ended
                if lost:
                    failed = np.isin(np.arange(rows.start, rows.stop), list(lost))
                    reward[failed], terminated[failed], truncated[failed] = 0.0, False, True
        return StepResult(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            final_obs=self._final_obs[group],
            episodes=episodes,
            failed=failed,
            faults=self._supervisor.take_texts(),
        )

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `BatchedEnv`; the arrays of `pack`, with unknown episodes where a worker has died."""
        self._expect_idle()
        if not self._replay:
            return {}
        replays = [EpisodeReplay.unknown(self.spec)] * self.num_envs
        workers = range(len(self._pool.slices))
        with _ClosingOnFailure(self):
            for worker in workers:
                self._supervisor.send(worker, ipc.REPLAYS)
            for worker in workers:
                answer = self._supervisor.receive(worker)
                if answer:
                    indices = self._pool.slices[worker]
                    rows = [EpisodeReplay.from_json(row, self.spec) for row in answer["replays"]]
                    replays[indices.start : indices.stop] = rows
        return pack(replays)

    def load_state_dict(
        self, state: Mapping[str, Array], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """See `BatchedEnv`. Episodes are replayed; one whose observations or rewards differ from before is not exact.

        The number of workers may be another than when `state` was taken.

        Raises:
            WorkerError: a fault that is not survived; the vector is closed then.
        """
        self._expect_idle()
        replays = unpack(state, self.spec, self.num_envs)
        workers = range(len(self._pool.slices))
        self._clear_outcomes()
        with _ClosingOnFailure(self):
            left = {}
            for worker in workers:
                indices = self._pool.slices[worker]
                rows = [replay.to_json() for replay in replays[indices.start : indices.stop]]
                self._supervisor.send(worker, ipc.RESTORE + json.dumps(rows).encode())
                left[worker] = len(indices)
            exact, done = np.zeros(self.num_envs, np.bool_), 0
            while left:
                for worker in list(left):  # a worker gives a sign of life far more often than the timeout asks for
                    answer = self._supervisor.receive(worker)
                    if worker in self._supervisor.dead:
                        done += left.pop(worker)
                    elif answer:
                        index, exact[index] = answer["restored"]
                        done, left[worker] = done + 1, left[worker] - 1
                        if progress is not None:
                            progress(done, self.num_envs)
                left = {worker: count for worker, count in left.items() if count}
            self._idle[:] = [replay.idle for replay in replays]
            for x in self.obs.values():
                x[self._idle] = 0
            for index in range(self.num_envs):
                self._peek_level(index)
            lost = self._begin_until_all_play(workers, set(np.flatnonzero(~exact & ~self._idle).tolist()))
        exact[list(lost)] = False
        self._running = True
        return exact

    def close(self) -> None:
        """End the workers. Happens by itself when the vector or the process ends."""
        if not self._closed:
            self._closed = True
            self._pool.close()

    def _clear_outcomes(self) -> None:
        """Write what an idle environment shows, should its worker die before it writes anything."""
        for x in (self._blocks.reward, self._blocks.terminated, self._blocks.truncated):
            x.fill(0)

    # --- levels and faults ------------------------------------------------------------------------------------------

    def _begin_level(self, index: int) -> int:
        seed = self._levels.begin(index)
        return -1 if seed is None else seed

    def _peek_level(self, index: int) -> None:
        seed = self._levels.peek(index)
        self._next_seeds[index] = -1 if seed is None else seed

    def _begin_until_all_play(
        self, workers: Iterable[int], waiting: set[int], broken: Mapping[int, str] | None = None
    ) -> set[int]:
        """Begin episodes in `waiting`, where environments broke, and where workers are dead, until all have begun.

        Returns those environments.
        """
        begun: set[int] = set()
        broken = broken or {}
        while True:
            failed = self._supervisor.repair(workers, broken)
            waiting = waiting | {index for index in failed if not self._idle[index]}
            if not waiting:
                return begun
            begun |= waiting
            broken, waiting = self._begin(sorted(waiting)), set()

    def _begin(self, indices: list[int]) -> dict[int, str]:
        """Begin an episode of the next level in each. Returns a text for each environment that broke, by index."""
        seeds = {index: self._begin_level(index) for index in indices}
        for index, seed in seeds.items():
            self._idle[index] = seed < 0
            self._peek_level(index)
        asked = []
        for worker, rows in enumerate(self._pool.slices):
            pairs = [(index, seeds[index]) for index in rows if index in seeds]
            if pairs:
                self._supervisor.send(worker, ipc.BEGIN + json.dumps(pairs).encode())
                asked.append(worker)
        return self._supervisor.outcomes(asked)[1]

    # --- checks -----------------------------------------------------------------------------------------------------

    def _checked(self, action: Array, rows: slice) -> np.ndarray:
        action, shape = np.asarray(action), self._blocks.action[rows].shape
        if action.shape != shape or action.dtype.kind not in "iu":
            raise ValueError(f"action must be integers of shape {shape}, not {action.dtype} of shape {action.shape}")
        if not ((action >= 0) & (action < self._nvec)).all():
            row = int(np.flatnonzero(((action < 0) | (action >= self._nvec)).any(axis=1))[0])
            where = f"environment {rows.start + row}"
            raise ValueError(f"action {action[row].tolist()} of {where} is not below {self.spec.action_nvec}")
        return action

    def _expect_open(self) -> None:
        if self._closed:
            raise WorkerError(f"the environments of {self.spec.env_id} are closed")

    def _expect_idle(self) -> None:
        self._expect_open()
        if self._in_flight:
            raise RuntimeError("a step is under way: receive()")


class _ClosingOnFailure:
    """Closes the vector where anything fails, or interrupts, in the middle of an exchange."""

    def __init__(self, vector: VectorEnv) -> None:
        self._vector = vector

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._vector.close()


def _where(num_groups: int, num_workers: int) -> str:
    workers = f"{num_workers} worker{'s' if num_workers > 1 else ''}" if num_workers else ""
    if num_groups > 1:
        return f"in two halves {f'of {workers} each' if workers else 'in this process'}"
    return f"in {workers or 'this process'}"


def _split(rows: range, parts: int) -> list[range]:
    """Split rows into ranges whose sizes differ by one at most."""
    bounds = [rows.start + len(rows) * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
