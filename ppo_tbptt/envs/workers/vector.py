"""N environments as one, in this process or in workers, with the same results bit for bit."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ppo_tbptt.envs.interface import EnvError, EnvSpec, Episode, Observation, StepResult, WorkerError
from ppo_tbptt.envs.make import plain_options
from ppo_tbptt.envs.workers import ipc as channel
from ppo_tbptt.envs.workers.group import InProcess
from ppo_tbptt.envs.workers.ipc import EnvRequest
from ppo_tbptt.envs.workers.pool import WorkerPool, resolve_workers
from ppo_tbptt.envs.workers.replay import EpisodeJournal, action_dtype


@dataclass(slots=True)
class Restarts:
    """How often workers were made anew, and how often they may be; several vectors may count together."""

    maximum: int = 0
    count: int = 0


class VectorEnv:
    """N environments with same-step autoreset.

    An environment that finishes is reset in the same step with the seed handed to that step: `obs` then holds the
    first observation of its next episode and `final_obs` the last one of the finished. With seed -1 it becomes idle
    instead: zero observations, reward 0, no flags, actions ignored, until the next `reset`.

    Where an environment or a worker fails (raises, hangs, dies, gives out what is no number or of another shape), all
    environments of that worker are made anew as long as `restarts` allows: they are *lost*. Their episodes are
    gone, their rows of `obs` mean nothing, and no call moves them until `restart` begins new episodes there; then
    `step_lost` lets them alone take the step that they missed. Without restarts left the vector is closed.

    spec: what each of them looks like.  num_envs: N.  num_workers: processes, 0 for none.
    obs: the current observations by key, `[N, ...]`, overwritten by each step: copy what is to stay.
    final_obs: likewise; row i holds data only right after a step that terminated or truncated environment i.
    restarts: the failures that were survived, as it was given.
    memory: all that workers share with this process, as bytes.
    """

    spec: EnvSpec
    obs: Observation
    final_obs: Observation
    memory: np.ndarray

    def __init__(
        self,
        env_id: str,
        *,
        num_envs: int,
        num_workers: int | Literal["auto"],
        options: Mapping[str, Any] | None = None,
        max_episode_steps: int | None = None,
        journal: bool = False,
        step_timeout: float | None = None,
        restarts: Restarts | None = None,
    ) -> None:
        """Make the environments. See `make_env` for `env_id`, `options` and `max_episode_steps`.

        Args:
            journal: keep what `journal` gives.
            step_timeout: seconds after which a worker that does not answer has failed; None: never. Environments of
                this process (no workers) may take any time.
            restarts: failures that are survived, and their count; none without it.

        Raises:
            EnvError: the request cannot be met; the message is one line.
            WorkerError: an environment or a worker failed; the message holds its traceback.
        """
        if num_envs < 1:
            raise EnvError(f"num_envs must be at least 1, not {num_envs}")
        self.num_envs = num_envs
        self.num_workers = resolve_workers(num_workers, num_envs)
        self.restarts = restarts or Restarts()
        self._faults: list[str] = []
        request = EnvRequest(env_id, plain_options(env_id, options), max_episode_steps, journal)
        self._journal = journal
        self._crew: WorkerPool | InProcess
        if self.num_workers:
            bounds = [num_envs * worker // self.num_workers for worker in range(self.num_workers + 1)]
            slices = [range(start, stop) for start, stop in itertools.pairwise(bounds)]
            self._crew = WorkerPool(request, slices, step_timeout)
        else:
            self._crew = InProcess(request, num_envs)
        self.spec, self._blocks = self._crew.spec, self._crew.blocks
        self.obs, self.final_obs = self._blocks.obs, self._blocks.final_obs
        self.memory = self._blocks.memory
        self._nvec = np.array(self.spec.action_nvec, np.int64)
        self._running = self._in_flight = self._closed = False
        self._told: list[int] = []  # workers that owe an answer
        self._lost: list[int] = []  # workers that were made anew and have not begun
        self._behind: list[int] = []  # workers that have begun again since the last step
        self._episodes: list[Episode] = []

    def reset(self, seeds: np.ndarray) -> np.ndarray | None:
        """Begin an episode in every environment: level seeds i64 [N], -1 to leave one idle. Fills `obs`.

        Returns the lost environments, bool [N], None where all is well.

        Raises:
            ValueError: `seeds` has another shape or is not of integers.
            WorkerError: an environment or a worker failed and no restarts are left; the vector is closed then.
        """
        self._expect(in_flight=False)
        self._blocks.next_seeds[:] = self._check_seeds(seeds)
        self._lost, self._behind = [], []
        self._tell(dict.fromkeys(range(len(self._crew.slices)), channel.RESET))
        self._listen()
        self._running = True
        return self._lost_rows()

    def restart(self, seeds: np.ndarray) -> np.ndarray | None:
        """Begin an episode in every environment that is lost: `seeds` as of `reset`, of which only theirs are read.

        Returns and raises like `reset`: an environment may be lost again.
        """
        self._expect(in_flight=False)
        self._blocks.next_seeds[:] = self._check_seeds(seeds)
        workers, self._lost = self._lost, []
        self._tell(dict.fromkeys(workers, channel.RESET))
        self._listen()
        self._behind += [worker for worker in workers if worker not in self._lost]
        return self._lost_rows()

    def send(self, action: np.ndarray, next_seeds: np.ndarray) -> None:
        """Start a step without waiting for it: `receive` must follow. Until then nothing of the vector may be read.

        Args:
            action: integers [N, A], each branch counting from 0; rows of idle environments must be in range too.
            next_seeds: integers [N], where environments that finish in this step go on; -1 for idle.

        Raises:
            ValueError: an argument has another shape, dtype or range.
            WorkerError: a worker failed and no restarts are left; the vector is closed then.
        """
        self._episodes = []
        self._send(action, next_seeds, self._present)

    def receive(self) -> StepResult:
        """Wait for the step that `send` started.

        Raises:
            WorkerError: an environment or a worker failed and no restarts are left; the vector is closed then.
        """
        self._expect(in_flight=True)
        self._in_flight = False
        for answer in self._listen().values():
            if answer:
                self._episodes += [Episode(*fields) for fields in answer["episodes"]]
        blocks, lost = self._blocks, self._lost_rows()
        if lost is not None:
            blocks.reward[lost], blocks.terminated[lost], blocks.truncated[lost] = 0.0, False, False
        return StepResult(
            blocks.reward.copy(), blocks.terminated.copy(), blocks.truncated.copy(), list(self._episodes), lost
        )

    def step(self, action: np.ndarray, next_seeds: np.ndarray) -> StepResult:
        """`send` and `receive`."""
        self.send(action, next_seeds)
        return self.receive()

    def step_lost(self, action: np.ndarray, next_seeds: np.ndarray) -> StepResult:
        """Let the environments that have restarted since the last step, and only them, take that step: as `step`.

        Returns the outcome of the step for all environments.
        """
        self._send(action, next_seeds, self._behind)
        result = self.receive()
        result.episodes.sort(key=lambda episode: episode.index)
        return result

    def journal(self) -> list[EpisodeJournal]:
        """Of every environment, where it is now: plain data for `restore`, here or in another vector of the same task.

        Raises:
            RuntimeError: the vector was made without `journal`.
            WorkerError: a worker failed and no restarts are left; the vector is closed then.
        """
        self._expect(in_flight=False)
        if not self._journal:
            raise RuntimeError("the environments keep no journal")
        journals = [EpisodeJournal.lost(self.spec)] * self.num_envs
        self._tell(dict.fromkeys(self._present, channel.JOURNAL))
        for worker, answer in self._listen().items():
            if answer:
                rows = [EpisodeJournal.from_json(row, self.spec) for row in answer["journals"]]
                indices = self._crew.slices[worker]
                journals[indices.start : indices.stop] = rows
        return journals

    def restore(
        self,
        journals: Sequence[EpisodeJournal],
        fallback_seeds: np.ndarray,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Bring every environment to where its journal ends, by replaying it. Fills `obs` with what is current there.

        Where a replay raises, ends early or differs in any observation or reward, the environment is reset with its
        level seed of `fallback_seeds` (i64 [N]) instead. The number of workers may differ from what it was when the
        journals were taken. `progress` is called with the number of environments that are done, and N.

        Returns bool [N], True where the environment is exactly where it was.

        Raises:
            ValueError: arguments of another length, shape or dtype.
            WorkerError: a worker failed and no restarts are left; the vector is closed then.
        """
        self._expect(in_flight=False)
        if len(journals) != self.num_envs:
            raise ValueError(f"{len(journals)} journals for {self.num_envs} environments")
        self._blocks.next_seeds[:] = self._check_seeds(fallback_seeds)
        rows = [self._check_journal(journal).to_json() for journal in journals]
        slices = self._crew.slices
        self._lost, self._behind = [], []
        self._tell(
            {
                worker: channel.RESTORE + json.dumps(rows[indices.start : indices.stop]).encode()
                for worker, indices in enumerate(slices)
            }
        )
        exact, done = np.zeros(self.num_envs, np.bool_), 0
        left = {worker: len(slices[worker]) for worker in self._told}
        with _closing_on_failure(self):
            while left:
                for worker in list(left):  # each gives a sign of life far more often than it must
                    answer = self._hear(worker)
                    if worker in self._lost:
                        done += left.pop(worker)
                    elif answer:
                        index, exact[index] = answer["restored"]
                        done, left[worker] = done + 1, left[worker] - 1
                        if progress is not None:
                            progress(done, self.num_envs)
                left = {worker: count for worker, count in left.items() if count}
            lost = self._lost_rows()
            while lost is not None:
                exact[lost] = False
                lost = self.restart(fallback_seeds)
        self._running = True
        return exact

    def take_faults(self) -> list[str]:
        """A text for each restart since the last call: a line, and the traceback where there is one."""
        faults, self._faults = self._faults, []
        return faults

    def close(self) -> None:
        """End the workers. Harmless when repeated; happens by itself when the vector or the process ends."""
        if not self._closed:
            self._closed = True
            self._crew.close()

    def __enter__(self) -> "VectorEnv":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_flight(self) -> bool:
        """Whether a step was sent that has not been received."""
        return self._in_flight

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._crew.pids

    def _send(self, action: np.ndarray, next_seeds: np.ndarray, workers: list[int]) -> None:
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
        self._behind = []
        self._tell(dict.fromkeys(workers, channel.STEP))
        self._in_flight = True

    def _tell(self, commands: dict[int, bytes]) -> None:
        """Give workers their commands; those that get them owe an answer."""
        self._told = []
        with _closing_on_failure(self):
            for worker, command in commands.items():
                try:
                    self._crew.tell(worker, command)
                except WorkerError as error:
                    self._replace(worker, error)
                else:
                    self._told.append(worker)

    def _hear(self, worker: int) -> Any:
        """The next answer of a worker; None, and the worker is lost, where it has failed."""
        try:
            return self._crew.hear(worker)
        except WorkerError as error:
            self._replace(worker, error)

    def _listen(self) -> dict[int, Any]:
        """An answer of each worker that owes one."""
        with _closing_on_failure(self):
            return {worker: self._hear(worker) for worker in self._told}

    @property
    def _present(self) -> list[int]:
        return [worker for worker in range(len(self._crew.slices)) if worker not in self._lost]

    def _replace(self, worker: int, error: Exception) -> None:
        """Make a worker that failed anew, again if the new one fails too; it is lost then."""
        while True:
            restarts = self.restarts
            if restarts.count >= restarts.maximum:
                if not restarts.maximum:
                    raise error
                count = f"after {restarts.count} restarts, of which a run may have {restarts.maximum}"
                raise WorkerError(f"{error}\n({count})") from None
            restarts.count += 1
            first, *traceback = str(error).strip().splitlines()
            restarted = f"{first.rstrip(':')}; restarted ({restarts.count} of at most {restarts.maximum})"
            self._faults.append("\n".join([restarted, *traceback]))
            try:
                self._crew.renew(worker)
            except (EnvError, WorkerError) as again:
                error = again
            else:
                self._lost.append(worker)
                return

    def _lost_rows(self) -> np.ndarray | None:
        if not self._lost:
            return None
        rows = np.zeros(self.num_envs, np.bool_)
        for worker in self._lost:
            indices = self._crew.slices[worker]
            rows[indices.start : indices.stop] = True
        return rows

    def _check_journal(self, journal: EpisodeJournal) -> EpisodeJournal:
        actions = np.asarray(journal.actions)
        branches = len(self.spec.action_nvec)
        if actions.ndim != 2 or actions.shape[1] != branches or actions.dtype.kind not in "iu":
            found = f"{actions.dtype} of shape {actions.shape}"
            raise ValueError(f"a journal's actions must be integers of shape (steps, {branches}), not {found}")
        return replace(journal, actions=actions.astype(action_dtype(self.spec)))

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
    """Close the vector if anything fails (or interrupts) in the middle of it: what is left is of no use."""

    def __init__(self, vector: VectorEnv) -> None:
        self._vector = vector

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._vector.close()
