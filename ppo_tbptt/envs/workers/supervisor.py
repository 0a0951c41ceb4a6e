"""Messages to the workers of a vector, and what is done about those that fail."""

from collections.abc import Iterable, Mapping
from typing import Any

from ppo_tbptt.envs.interface import EnvError, Episode, FaultBudget, WorkerError
from ppo_tbptt.envs.workers.group import InProcess
from ppo_tbptt.envs.workers.pool import WorkerPool


class Supervisor:
    """Exchanges messages with workers, restarts those that die or hang, and counts all faults.

    dead: workers that have failed, with the reason; nothing reaches them until `repair` restarts them.
    """

    def __init__(self, pool: WorkerPool | InProcess, budget: FaultBudget) -> None:
        """Supervise the workers of `pool`."""
        self.dead: dict[int, WorkerError | EnvError] = {}
        self._pool, self._budget = pool, budget
        self._texts: list[str] = []

    def send(self, worker: int, command: bytes) -> None:
        """Send a command, unless the worker is dead."""
        if worker not in self.dead:
            try:
                self._pool.send(worker, command)
            except WorkerError as error:
                self.dead[worker] = error

    def receive(self, worker: int) -> Any:
        """Wait for an answer; None, too, where the worker is dead or dies."""
        if worker not in self.dead:
            try:
                return self._pool.receive(worker)
            except WorkerError as error:
                self.dead[worker] = error
        return None

    def outcomes(self, workers: Iterable[int]) -> tuple[list[Episode], dict[int, str]]:
        """Wait for the answers to STEP or BEGIN.

        Returns the episodes that ended, and a text for each environment that broke, by index.
        """
        episodes: list[Episode] = []
        broken: dict[int, str] = {}
        for worker in workers:
            answer = self.receive(worker)
            if answer:
                episodes += [Episode(*fields) for fields in answer["episodes"]]
                broken.update(answer["faults"])
        return episodes, broken

    def repair(self, workers: Iterable[int], broken: Mapping[int, str]) -> set[int]:
        """Count the environments that broke, and restart the workers that are dead.

        Returns all environments that must begin an episode: those that broke and those of restarted workers.

        Raises:
            WorkerError, EnvError: the budget of faults is spent.
        """
        failed = set(broken)
        for text in broken.values():
            self._texts.append(self._budget.spend(WorkerError(text), "made anew"))
        for worker in [worker for worker in workers if worker in self.dead]:
            self._restart(worker)
            failed.update(self._pool.slices[worker])
        return failed

    def take_texts(self) -> tuple[str, ...]:
        """Return a text for each fault since the last call."""
        texts, self._texts = tuple(self._texts), []
        return texts

    def _restart(self, worker: int) -> None:
        while worker in self.dead:
            self._texts.append(self._budget.spend(self.dead[worker], "restarted"))
            try:
                self._pool.restart(worker)
            except (EnvError, WorkerError) as error:
                self.dead[worker] = error
            else:
                del self.dead[worker]
