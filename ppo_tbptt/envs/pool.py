"""The worker processes of one vector: started together, told what to do, and always ended."""

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ppo_tbptt.envs import channel
from ppo_tbptt.envs.blocks import Blocks, anonymous_file
from ppo_tbptt.envs.errors import EnvError, WorkerError
from ppo_tbptt.envs.spec import EnvSpec, Episode
from ppo_tbptt.envs.worker import BOOTSTRAP, THREADS

_GRACE_S = 2.0
"""How long a worker may take to close its environments before it is cut off, and then to exit before it is killed."""


def resolve_workers(num_workers: int | Literal["auto"], num_envs: int) -> int:
    """Number of worker processes: as asked for, `"auto"` the cores this process may use; never more than `num_envs`.

    Raises:
        EnvError: a number that is negative, or a word other than "auto".
    """
    if num_workers == "auto":
        affinity = getattr(os, "sched_getaffinity", None)
        num_workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    if not isinstance(num_workers, int) or num_workers < 0:
        raise EnvError(f"num_workers must be 'auto' or at least 0, not {num_workers!r}")
    return min(num_workers, num_envs)


class WorkerPool:
    """One process per range of `slices`, each with the environments of that range.

    Workers are plain interpreters, neither forked (threads, CUDA) nor started by multiprocessing (which would import
    the user's `__main__` again); they get numbers and text over a socket, and arrays through shared memory.

    spec: what the environments look like.  blocks: the shared arrays.
    """

    spec: EnvSpec
    blocks: Blocks

    def __init__(
        self, env_id: str, options: Mapping[str, Any] | None, max_episode_steps: int | None, slices: Sequence[range]
    ) -> None:
        """Start the workers and wait until all have made their environments.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: an environment or a worker failed.
        """
        self._slices = list(slices)
        self._num_envs = slices[-1].stop
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[socket.socket] = []
        lifeline, self._lifeline = os.pipe()
        self._finalizer = weakref.finalize(self, _end, self._processes, self._connections, self._lifeline, os.getpid())
        try:
            for indices in self._slices:
                self._spawn(lifeline)
                task: dict[str, Any] = {"env_id": env_id, "options": options}
                task |= {"max_episode_steps": max_episode_steps, "num_envs": self._num_envs}
                task |= {"indices": [indices.start, indices.stop]}
                self._tell(len(self._processes) - 1, json.dumps(task).encode())
            self._meet()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(lifeline)

    def send(self, command: bytes) -> None:
        """Give `command` to every worker without waiting for it."""
        for worker in range(len(self._processes)):
            self._tell(worker, command)

    def receive(self) -> list[Episode]:
        """Wait until every worker has done what it was told; the episodes that ended, by index.

        Raises:
            WorkerError: one failed.
        """
        episodes: list[Episode] = []
        for worker in range(len(self._processes)):
            answer = self._hear(worker)
            if answer:
                episodes += [Episode(*fields) for fields in answer["episodes"]]
        return episodes

    @property
    def pids(self) -> list[int]:
        """Process ids, by worker."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the workers, gently if they listen, and reap them. Harmless when repeated."""
        self._finalizer()

    def _spawn(self, lifeline: int) -> None:
        ours, theirs = socket.socketpair()
        self._connections.append(ours)
        path = [entry or os.getcwd() for entry in sys.path]
        argument = json.dumps([path, [theirs.fileno(), lifeline]])
        # The signals are blocked until the worker ignores them: a Ctrl-C in between must not end it.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, argument],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), lifeline),
                env={**os.environ, **dict.fromkeys(THREADS, "1")},
            )
            self._processes.append(process)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            theirs.close()

    def _meet(self) -> None:
        specs = [EnvSpec.from_json(self._hear(worker)["spec"]) for worker in range(len(self._processes))]
        self.spec = specs[0]
        if any(spec != self.spec for spec in specs):
            raise WorkerError(f"{self.spec.env_id} looks different in every worker: {specs}")
        size = Blocks.size(self.spec, self._num_envs)
        descriptor = anonymous_file(size)
        try:
            self.blocks = Blocks(self.spec, self._num_envs, mmap.mmap(descriptor, size))
            self.blocks.poison()
            for worker, connection in enumerate(self._connections):
                try:
                    socket.send_fds(connection, [b"m"], [descriptor])
                except OSError:
                    raise self._death(worker) from None
        finally:
            os.close(descriptor)

    def _tell(self, worker: int, payload: bytes) -> None:
        try:
            channel.send(self._connections[worker], payload)
        except channel.Closed:
            raise self._death(worker) from None

    def _hear(self, worker: int) -> Any:
        try:
            answer = channel.receive_json(self._connections[worker])
        except channel.Closed:
            raise self._death(worker) from None
        if answer and "error" in answer:
            raise EnvError(answer["error"]) if answer["by_user"] else WorkerError(answer["error"])
        return answer

    def _death(self, worker: int) -> WorkerError:
        _wait([self._processes[worker]], _GRACE_S)
        code, indices = self._processes[worker].returncode, self._slices[worker]
        how = "hung up"
        if code is not None:
            how = f"exited with status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return WorkerError(f"worker {worker} (environments {indices.start} to {indices.stop - 1}) {how}")


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Reap `processes` for up to `seconds`; whether all of them have ended."""
    end = time.monotonic() + seconds
    while [process for process in processes if process.poll() is None]:  # polls, and thereby reaps, all of them
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def _end(processes: list[subprocess.Popen[bytes]], connections: list[socket.socket], lifeline: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the vector's process has no say over its workers
    for connection in connections:
        connection.close()
    ended = _wait(processes, _GRACE_S)
    os.close(lifeline)
    if not ended and not _wait(processes, _GRACE_S):
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
