"""A worker process: a slice of a vector's environments, driven over a socket, on memory it shares with the vector."""

import mmap
import os
import signal
import socket
import threading
import traceback
from contextlib import suppress
from typing import Any

from ppo_tbptt.envs.interface import EnvError, WorkerError
from ppo_tbptt.envs.workers import ipc
from ppo_tbptt.envs.workers.group import EnvGroup
from ppo_tbptt.envs.workers.ipc import Blocks, EnvRequest

BOOTSTRAP = """\
import json, sys
path, descriptors = json.loads(sys.argv[1])
sys.path[:] = path
from ppo_tbptt.envs.workers.worker import main
main(*descriptors)
"""
"""The program of a worker: it imports from where the vector's process does, but never that process's `__main__`."""

THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
"""Environment variables that keep the libraries of one worker from starting a thread per core."""


def main(connection_descriptor: int, lifeline_descriptor: int) -> None:
    """Serve until the vector closes the connection; exit when the vector's process ends.

    SIGINT and SIGTERM are ignored, because the vector ends its workers itself.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_die_with_parent, args=(lifeline_descriptor,), daemon=True).start()
    with socket.socket(fileno=connection_descriptor) as connection:
        try:
            _serve(connection)
        except ipc.Closed:
            pass  # the vector was closed
        except (EnvError, WorkerError) as error:
            _report(connection, str(error), "user" if isinstance(error, EnvError) else "environment")
        except BaseException:
            _report(connection, traceback.format_exc(), "worker")


def _die_with_parent(descriptor: int) -> None:
    """Exit at once, even in the middle of a step, when the only process that can write to the pipe has ended."""
    while os.read(descriptor, 1):
        pass
    os._exit(1)


def _serve(connection: socket.socket) -> None:
    task: dict[str, Any] = ipc.receive_json(connection)
    group = EnvGroup(EnvRequest(**task["request"]), range(*task["indices"]))
    try:
        ipc.send_json(connection, {"spec": group.spec.to_json()})
        group.attach(_map(connection, group, task["num_envs"]))
        while True:
            for answer in group.answers(ipc.receive(connection)):
                if answer is None:
                    ipc.send(connection, ipc.EMPTY)
                else:
                    ipc.send_json(connection, answer)
    finally:
        group.close()


def _map(connection: socket.socket, group: EnvGroup, num_envs: int) -> Blocks:
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise ipc.Closed("no memory came")
    memory = mmap.mmap(descriptors[0], Blocks.size(group.spec, num_envs))
    os.close(descriptors[0])
    return Blocks(group.spec, num_envs, memory)


def _report(connection: socket.socket, error: str, blame: str) -> None:
    with suppress(ipc.Closed):  # then the vector no longer wants to know
        ipc.send_json(connection, {"error": error, "blame": blame})
