"""The worker processes of one batch: start them, exchange messages with them, restart and end them."""

import os
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ppo_tbptt.envs.interface import EnvError, EnvSpec, WorkerError
from ppo_tbptt.envs.workers.ipc import Blocks, Channel, anonymous_file, start_process

START_PATIENCE_S = 300.0
"""How long a worker may take to import what it needs and to make its environments."""

_GRACE_S = 2.0
"""How long a worker may take to close its environments before it is cut off, and then to exit before it is killed."""


class WorkerPool:
    """One process per range of `slices`, each with the environments of that range.

    spec: what the environments look like.  blocks: the shared arrays.  slices: the environments of each worker.
    dead: workers that have failed, with the reason; nothing reaches them until `restart` succeeds.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        slices: Sequence[range],
        replay: bool,
        stages: Sequence[Mapping[str, Any]],
        step_timeout: float | None,
    ) -> None:
        """Start the workers and wait until all have made their environments. See `EnvGroup`."""
        self.slices, self._timeout = slices, step_timeout
        self.dead: dict[int, EnvError | WorkerError] = {}
        self._task = {"env": arguments, "replay": replay, "stages": stages, "num_envs": slices[-1].stop}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        lifeline, ours = os.pipe()
        memory = anonymous_file()
        self._inherited = (lifeline, memory)
        descriptors = [*self._inherited, ours]
        self._finalizer = weakref.finalize(self, _end, self._processes, self._channels, descriptors, os.getpid())
        try:
            for worker in range(len(slices)):
                self._start(worker)
            self.spec = EnvSpec.from_json(self._receive(0))
            for worker in range(1, len(slices)):
                self._check_spec(worker)
            self.blocks = Blocks(self.spec, slices[-1].stop, memory)
            for worker in range(len(slices)):
                self._attach(worker)
        except BaseException:
            self.close()
            raise

    def send(self, worker: int, *command: Any) -> None:
        """Send a command of `EnvGroup.answers`, unless the worker is dead."""
        if worker not in self.dead:
            try:
                self._send(worker, command)
            except WorkerError as error:
                self.dead[worker] = error

    def receive(self, worker: int) -> Any:
        """Wait for the next answer, for `step_timeout` at most; None, too, where the worker is dead or dies."""
        if worker not in self.dead:
            try:
                return self._receive(worker)
            except (EnvError, WorkerError) as error:
                self.dead[worker] = error
        return None

    def restart(self, worker: int) -> None:
        """Kill a dead worker, whatever it does, and start another with the same environments on the same memory.

        The worker stays dead where that fails, or where its environments look different.
        """
        self._channels[worker].close()
        self._processes[worker].kill()
        self._processes[worker].wait()  # from here on nobody writes to its part of the memory
        try:
            self._start(worker)
            self._check_spec(worker)
            self._attach(worker)
        except (EnvError, WorkerError) as error:
            self.dead[worker] = error
        else:
            del self.dead[worker]

    @property
    def pids(self) -> list[int]:
        """Process ids, by worker."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the workers, gently if they listen, and reap them. Harmless when repeated."""
        self._finalizer()

    def _start(self, worker: int) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(START_PATIENCE_S)
        self._channels[worker : worker + 1] = [Channel(ours)]
        with theirs:
            try:
                process = start_process("ppo_tbptt.envs.workers.worker", theirs.fileno(), *self._inherited)
                self._processes[worker : worker + 1] = [process]
            except OSError as error:
                raise WorkerError(f"{self._name(worker)} could not be started: {error}") from error
        self._send(worker, {**self._task, "indices": [self.slices[worker].start, self.slices[worker].stop]})

    def _check_spec(self, worker: int) -> None:
        spec = EnvSpec.from_json(self._receive(worker))
        if spec != self.spec:
            raise WorkerError(f"{self._name(worker)} has environments that look different: {spec}, not {self.spec}")

    def _attach(self, worker: int) -> None:
        self._send(worker, "attach")
        self._channels[worker].socket.settimeout(self._timeout)

    def _send(self, worker: int, message: Any) -> None:
        try:
            self._channels[worker].send(message)
        except OSError as error:
            raise self._failure(worker, error) from None

    def _receive(self, worker: int) -> Any:
        try:
            answer = self._channels[worker].receive()
        except OSError as error:
            raise self._failure(worker, error) from None
        if isinstance(answer, dict) and "error" in answer:
            if answer["blame"] == "user":
                raise EnvError(answer["error"])
            about = f"{self._name(worker)} failed:\n" if answer["blame"] == "worker" else ""
            raise WorkerError(about + answer["error"])
        return answer

    def _name(self, worker: int) -> str:
        indices = self.slices[worker]
        return f"worker {worker} (environments {indices.start} to {indices.stop - 1})"

    def _failure(self, worker: int, error: OSError) -> WorkerError:
        """Say why a worker cannot be reached."""
        if isinstance(error, TimeoutError):
            patience = self._channels[worker].socket.gettimeout()
            return WorkerError(f"{self._name(worker)} did not answer within {patience:g} s")
        _wait([self._processes[worker]], _GRACE_S)
        code = self._processes[worker].returncode
        how = "hung up"
        if code is not None:
            how = f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return WorkerError(f"{self._name(worker)} {how}")


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Reap `processes` for up to `seconds`, and return whether all of them have ended."""
    end = time.monotonic() + seconds
    while [process for process in processes if process.poll() is None]:  # polls, and thereby reaps, all of them
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def _end(processes: list[subprocess.Popen[bytes]], channels: list[Channel], descriptors: list[int], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the batch's process has no say over its workers
    for channel in channels:
        channel.close()
    ended = _wait(processes, _GRACE_S)
    for descriptor in descriptors:
        os.close(descriptor)
    if not ended and not _wait(processes, _GRACE_S):
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
