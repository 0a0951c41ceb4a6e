"""N environments behind `BatchedEnv`, in this process or in workers, with the same results bit for bit."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np

from ppo_tbptt.envs.interface import Array, BatchedEnv, EnvError, Episode, FaultBudget, StepResult, WorkerError
from ppo_tbptt.envs.levels import LevelSource
from ppo_tbptt.envs.make import plain_options
from ppo_tbptt.envs.workers.cores import resolve_workers
from ppo_tbptt.envs.workers.group import InProcess
from ppo_tbptt.envs.workers.pool import WorkerPool
from ppo_tbptt.envs.workers.replay import EpisodeReplay, pack, unpack


class VectorEnv(BatchedEnv):
    """See `BatchedEnv`. Environments are spread over worker processes, or all live in this one.

    An environment that raises, or gives out what is no number or of another shape, is made anew alone. A process that
    dies or hangs is restarted, and all of its environments fail. Both count against the budget of faults, and so does
    a reset that fails, after which the next level is tried. When the budget is spent the batch is closed.

    num_workers: processes that step at the same time, 0 for none.
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
        stages: Sequence[Mapping[str, Any]] = (),
        max_episode_steps: int | None = None,
        previous: Sequence[str] = (),
        replay: bool = False,
        step_timeout: float | None = None,
        faults: FaultBudget | None = None,
    ) -> None:
        """Make the environments.

        Args:
            env_id: as of `make_env`.
            num_envs: N.
            levels: which levels they play.
            num_workers: processes of each group; 0 for none.
            two_groups: split the environments into halves, which depend on N alone.
            options: as of `make_env`.
            stages: options over those, of levels of stage 1, 2 and so on; see `LevelSource.stage`.
            max_episode_steps: as of `make_env`.
            previous: as of `make_env`.
            replay: record unfinished episodes for `state_dict`.
            step_timeout: seconds after which a worker that does not answer is taken for hung; None: never.
            faults: how many are survived; none without it.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: a worker failed.
        """
        if num_envs < 1:
            raise EnvError(f"num_envs must be at least 1, not {num_envs}")
        self.num_envs, self._levels, self._replay = num_envs, levels, replay
        middle = (num_envs + 1) // 2
        halves = two_groups and num_envs > 1
        groups = [range(middle), range(middle, num_envs)] if halves else [range(num_envs)]
        self.groups = tuple(slice(group.start, group.stop) for group in groups)
        self.num_workers = resolve_workers(num_workers, len(groups[0]))
        self.where = _where(len(groups), self.num_workers)
        slices: list[range] = []
        self._workers: list[range] = []  # of each group
        for group in groups:
            count = max(1, min(self.num_workers, len(group)))
            bounds = [group.start + len(group) * part // count for part in range(count + 1)]
            self._workers.append(range(len(slices), len(slices) + count))
            slices += [range(start, stop) for start, stop in itertools.pairwise(bounds)]
        self._all_workers = range(len(slices))
        options = plain_options(env_id, options)
        arguments = {"env_id": env_id, "options": options, "max_episode_steps": max_episode_steps}
        arguments["previous"] = list(previous)
        plain_stages = [plain_options(env_id, stage) or {} for stage in stages]
        if self.num_workers:
            self._pool = WorkerPool(arguments, slices, replay, plain_stages, step_timeout)
        else:
            self._pool = InProcess(arguments, slices, replay, plain_stages)
        self.spec, self._blocks = self._pool.spec, self._pool.blocks
        self._blocks.poison()
        self.obs, self.hashes, self.host_memory = self._blocks.obs, self._blocks.hashes, self._blocks.memory
        self._final_obs = [{key: x[rows] for key, x in self._blocks.final_obs.items()} for rows in self.groups]
        self._nvec = np.array(self.spec.action_nvec, np.int64)
        self._idle = np.ones(num_envs, np.bool_)
        self._faults, self._texts = faults or FaultBudget(), list[str]()
        self._in_flight: set[int] = set()
        self._running = self._closed = False

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers, of all groups."""
        return self._pool.pids

    def reset(self) -> Mapping[str, np.ndarray]:
        """See `BatchedEnv`. Raises like `receive`."""
        self._expect_idle()
        self._clear_outcomes()
        with self._closing_on_failure():
            self._begin_until_all_play(self._all_workers, set(range(self.num_envs)), {})
        self._running = True
        return self.obs

    def send(self, action: Array, group: int = 0) -> None:
        """See `BatchedEnv`. Raises ValueError where `action` has another shape, dtype or range."""
        self._expect_open()
        if not self._running or group in self._in_flight:
            raise RuntimeError("a step is under way: receive()" if self._running else "reset before the first step")
        rows = self.groups[group]
        self._blocks.action[rows] = self._checked(action, rows)
        self._in_flight.add(group)
        with self._closing_on_failure():
            for worker in self._workers[group]:
                self._pool.send(worker, "step")

    def receive(self, group: int = 0) -> StepResult:
        """See `BatchedEnv`."""
        self._expect_open()
        if group not in self._in_flight:
            raise RuntimeError("receive() needs a send() before it")
        self._in_flight.discard(group)
        workers, rows, blocks = self._workers[group], self.groups[group], self._blocks
        failed: np.ndarray | None = None
        with self._closing_on_failure():
            episodes, broken = self._outcomes(workers)
            for episode in episodes:
                self._levels.ended(episode.index, episode)
                self._begin_level(episode.index)
                self._peek_level(episode.index)
            reward, terminated = blocks.reward[rows].copy(), blocks.terminated[rows].copy()
            truncated = blocks.truncated[rows].copy()
            lost: set[int] = set()
            if broken or self._pool.dead:
                lost = self._begin_until_all_play(workers, set(), broken) - {episode.index for episode in episodes}
            if lost:
                failed = np.isin(np.arange(rows.start, rows.stop), list(lost))
                reward[failed], terminated[failed], truncated[failed] = 0.0, False, True
        texts, self._texts = tuple(self._texts), []
        return StepResult(
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            final_obs=self._final_obs[group],
            episodes=episodes,
            failed=failed,
            faults=texts,
        )

    def state_dict(self) -> dict[str, np.ndarray]:
        """See `BatchedEnv`; the arrays of `pack`, with unknown episodes where a worker has died."""
        self._expect_idle()
        if not self._replay:
            return {}
        unknown = EpisodeReplay(0, np.empty((0, len(self._nvec)), np.uint8), 0)
        replays = [unknown] * self.num_envs
        with self._closing_on_failure():
            for worker in self._all_workers:
                self._pool.send(worker, "replays")
            for worker in self._all_workers:
                answer = self._pool.receive(worker)
                if answer is not None:
                    rows = self._pool.slices[worker]
                    replays[rows.start : rows.stop] = [EpisodeReplay(*row) for row in answer]
        return pack(replays)

    def load_state_dict(
        self, state: Mapping[str, Array], progress: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """See `BatchedEnv`. Replays the episodes; one whose observations or rewards differ from before is not exact."""
        self._expect_idle()
        replays = unpack(state, self.spec, self.num_envs)
        self._clear_outcomes()
        exact = np.zeros(self.num_envs, np.bool_)
        with self._closing_on_failure():
            for worker in self._all_workers:
                rows = self._pool.slices[worker]
                self._pool.send(worker, "restore", replays[rows.start : rows.stop])
            left = {worker: len(self._pool.slices[worker]) for worker in self._all_workers}
            while left := {worker: n for worker, n in left.items() if n and worker not in self._pool.dead}:
                for worker in left:  # a worker gives a sign of life far more often than the timeout asks for
                    answer = self._pool.receive(worker)
                    if answer:
                        index, exact[index] = answer
                        left[worker] -= 1
                        if progress is not None:
                            progress(self.num_envs - sum(left.values()), self.num_envs)
            self._idle[:] = [replay.seed < 0 for replay in replays]
            for index in np.flatnonzero(self._idle):
                self._blocks.show(int(index), None)
            for index in range(self.num_envs):
                self._peek_level(index)
            waiting = set(np.flatnonzero(~exact & ~self._idle).tolist())
            lost = self._begin_until_all_play(self._all_workers, waiting, {})
        exact[list(lost)] = False
        self._running = True
        return exact

    def close(self) -> None:
        """End the workers. Happens by itself when the batch or the process ends."""
        if not self._closed:
            self._closed = True
            self._pool.close()

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        """Close the batch where anything fails, or interrupts, in the middle of an exchange with workers."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _clear_outcomes(self) -> None:
        """Write what an idle environment shows, should its worker die before it writes anything."""
        for x in (self._blocks.reward, self._blocks.terminated, self._blocks.truncated):
            x.fill(0)

    # --- levels and faults ------------------------------------------------------------------------------------------

    def _begin_level(self, index: int) -> tuple[int, int]:
        """Move on to the environment's next level, and return its seed, -1 for none, and its stage."""
        stage = self._levels.stage(index)
        seed = self._levels.begin(index)
        self._idle[index] = seed is None
        return -1 if seed is None else seed, stage

    def _peek_level(self, index: int) -> None:
        seed = self._levels.peek(index)
        self._blocks.next_seeds[index] = -1 if seed is None else seed
        self._blocks.next_stages[index] = self._levels.stage(index)

    def _outcomes(self, workers: Iterable[int]) -> tuple[list[Episode], dict[int, str]]:
        """Wait for the answers to step or begin: episodes that ended, and a text by index for what broke."""
        episodes: list[Episode] = []
        broken: dict[int, str] = {}
        for worker in workers:
            ended, faults = self._pool.receive(worker) or ([], [])
            episodes += [Episode(*fields) for fields in ended]
            broken.update(faults)
        return episodes, broken

    def _begin_until_all_play(self, workers: Iterable[int], waiting: set[int], broken: Mapping[int, str]) -> set[int]:
        """Begin episodes in `waiting`, where environments broke and where workers are dead. Returns all these."""
        begun: set[int] = set()
        while waiting := waiting | self._repair(workers, broken):
            begun |= waiting
            broken, waiting = self._begin(sorted(waiting)), set()
        return begun

    def _repair(self, workers: Iterable[int], broken: Mapping[int, str]) -> set[int]:
        """Count the environments that broke, and restart the workers that are dead.

        Returns all environments that must begin an episode. Raises where the budget of faults is spent.
        """
        failed = set(broken)
        for text in broken.values():
            self._texts.append(self._faults.spend(WorkerError(text), "made anew"))
        for worker in workers:
            while worker in self._pool.dead:
                self._texts.append(self._faults.spend(self._pool.dead[worker], "restarted"))
                self._pool.restart(worker)
                failed.update(self._pool.slices[worker])
        return {index for index in failed if not self._idle[index]}

    def _begin(self, indices: list[int]) -> dict[int, str]:
        """Begin an episode of the next level in each. Returns a text for each environment that broke, by index."""
        levels = {index: self._begin_level(index) for index in indices}
        for index in indices:
            self._peek_level(index)
        asked = []
        for worker, rows in enumerate(self._pool.slices):
            begins = [(index, *levels[index]) for index in rows if index in levels]
            if begins:
                self._pool.send(worker, "begin", begins)
                asked.append(worker)
        return self._outcomes(asked)[1]

    # --- checks -----------------------------------------------------------------------------------------------------

    def _checked(self, action: Array, rows: slice) -> np.ndarray:
        action, shape = np.asarray(action), self._blocks.action[rows].shape
        if action.shape != shape or action.dtype.kind not in "iu":
            raise ValueError(f"action must be integers of shape {shape}, not {action.dtype} of shape {action.shape}")
        wrong = ((action < 0) | (action >= self._nvec)).any(axis=1)
        if wrong.any():
            choices, index = action[wrong][0].tolist(), rows.start + wrong.argmax()
            raise ValueError(f"action {choices} of environment {index} is not below {self.spec.action_nvec}")
        return action

    def _expect_open(self) -> None:
        if self._closed:
            raise WorkerError(f"the environments of {self.spec.env_id} are closed")

    def _expect_idle(self) -> None:
        self._expect_open()
        if self._in_flight:
            raise RuntimeError("a step is under way: receive()")


def _where(num_groups: int, num_workers: int) -> str:
    workers = f"{num_workers} worker{'s' * (num_workers > 1)}" if num_workers else "this process"
    if num_groups == 1:
        return f"in {workers}"
    return f"in two halves of {workers} each" if num_workers else f"in two halves in {workers}"
