"""The worker processes of one vector: start them, exchange messages with them, restart and end them."""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ppo_tbptt.envs.interface import EnvError, EnvSpec, WorkerError
from ppo_tbptt.envs.workers import ipc
from ppo_tbptt.envs.workers.ipc import Blocks, EnvRequest, anonymous_file
from ppo_tbptt.envs.workers.worker import BOOTSTRAP, THREADS

START_PATIENCE_S = 300.0
"""How long a worker may take to import what it needs and to make its environments."""

_GRACE_S = 2.0
"""How long a worker may take to close its environments before it is cut off, and then to exit before it is killed."""


class WorkerPool:
    """One process per range of `slices`, each with the environments of that range.

    Workers are plain interpreters, neither forked (threads, CUDA) nor started by multiprocessing (which would import
    the user's `__main__` again); they get numbers and text over a socket, and arrays through shared memory.

    spec: what the environments look like.  blocks: the shared arrays.  slices: the environments of each worker.
    """

    spec: EnvSpec
    blocks: Blocks

    def __init__(self, request: EnvRequest, slices: Sequence[range], step_timeout: float | None) -> None:
        """Start the workers and wait until all have made their environments.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: an environment or a worker failed.
        """
        self.slices = list(slices)
        self._request, self._timeout = request, step_timeout
        self._num_envs = slices[-1].stop
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        self._lifeline, ours = os.pipe()
        self._descriptors = [self._lifeline, ours]
        self._finalizer = weakref.finalize(
            self, _end, self._processes, self._connections, self._descriptors, os.getpid()
        )
        try:
            for worker in range(len(self.slices)):
                self._spawn(worker)
            specs = [self._greet(worker) for worker in range(len(self.slices))]
            self.spec = specs[0]
            if any(spec != self.spec for spec in specs):
                raise WorkerError(f"{self.spec.env_id} looks different in every worker: {specs}")
            size = Blocks.size(self.spec, self._num_envs)
            self._memory = anonymous_file(size)
            self._descriptors.append(self._memory)
            self.blocks = Blocks(self.spec, self._num_envs, mmap.mmap(self._memory, size))
            self.blocks.poison()
            for worker in range(len(self.slices)):
                self._share(worker)
        except BaseException:
            self.close()
            raise

    def send(self, worker: int, command: bytes) -> None:
        """Send a command to a worker.

        Raises:
            WorkerError: the worker is gone.
        """
        try:
            ipc.send(self._connections[worker], command)
        except ipc.Closed:
            raise self._death(worker) from None
        except TimeoutError:
            raise self._silence(worker) from None

    def receive(self, worker: int) -> Any:
        """Wait for the next answer of a worker, for `step_timeout` at most.

        Raises:
            EnvError: the environments cannot be made as they were asked for.
            WorkerError: an environment or the worker failed, or gave no answer in time.
        """
        try:
            answer = ipc.receive_json(self._connections[worker])
        except ipc.Closed:
            raise self._death(worker) from None
        except TimeoutError:
            raise self._silence(worker) from None
        if answer and "error" in answer:
            if answer["blame"] == "user":
                raise EnvError(answer["error"])
            about = f"{self._name(worker)} failed:\n" if answer["blame"] == "worker" else ""
            raise WorkerError(about + answer["error"])
        return answer

    def restart(self, worker: int) -> None:
        """Kill a worker, whatever it does, and start another with the same environments on the same memory.

        Raises:
            EnvError, WorkerError: the new worker failed, or its environments look different.
        """
        if not self._finalizer.alive:
            raise WorkerError("the workers have been ended")
        self._connections[worker].close()
        self._processes[worker].kill()
        self._processes[worker].wait()  # from here on nobody writes to its part of the memory
        self._spawn(worker)
        spec = self._greet(worker)
        if spec != self.spec:
            raise WorkerError(f"{self._name(worker)} was restarted, and looks different: {spec}, not {self.spec}")
        self._share(worker)

    @property
    def pids(self) -> list[int]:
        """Process ids, by worker."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the workers, gently if they listen, and reap them. Harmless when repeated."""
        self._finalizer()

    def _spawn(self, worker: int) -> None:
        ours, theirs = socket.socketpair()
        ours.settimeout(START_PATIENCE_S)
        self._connections[worker : worker + 1] = [ours]
        path = [entry or os.getcwd() for entry in sys.path]
        argument = json.dumps([path, [theirs.fileno(), self._lifeline]])
        # The signals are blocked until the worker ignores them: a Ctrl-C in between must not end it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, argument],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), self._lifeline),
                env={**os.environ, **dict.fromkeys(THREADS, "1")},
            )
            self._processes[worker : worker + 1] = [process]
        except OSError as error:
            raise WorkerError(f"{self._name(worker)} could not be started: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()
        indices = self.slices[worker]
        task = {"request": asdict(self._request), "num_envs": self._num_envs}
        self.send(worker, json.dumps({**task, "indices": [indices.start, indices.stop]}).encode())

    def _greet(self, worker: int) -> EnvSpec:
        return EnvSpec.from_json(self.receive(worker)["spec"])

    def _share(self, worker: int) -> None:
        try:
            socket.send_fds(self._connections[worker], [b"m"], [self._memory])
        except OSError:
            raise self._death(worker) from None
        self._connections[worker].settimeout(self._timeout)

    def _name(self, worker: int) -> str:
        indices = self.slices[worker]
        return f"worker {worker} (environments {indices.start} to {indices.stop - 1})"

    def _silence(self, worker: int) -> WorkerError:
        return WorkerError(f"{self._name(worker)} did not answer within {self._connections[worker].gettimeout():g} s")

    def _death(self, worker: int) -> WorkerError:
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


def _end(
    processes: list[subprocess.Popen[bytes]], connections: list[socket.socket], descriptors: list[int], owner: int
) -> None:
    if os.getpid() != owner:
        return  # a fork of the vector's process has no say over its workers
    for connection in connections:
        connection.close()
    ended = _wait(processes, _GRACE_S)
    for descriptor in descriptors:
        os.close(descriptor)
    if not ended and not _wait(processes, _GRACE_S):
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
