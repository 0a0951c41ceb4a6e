"""A worker process: a slice of a batch's environments, driven over a socket, on memory it shares with the batch."""

import os
import socket
import threading
import traceback
from contextlib import suppress

from ppo_tbptt.envs.interface import EnvError, WorkerError
from ppo_tbptt.envs.workers.group import EnvGroup
from ppo_tbptt.envs.workers.ipc import Blocks, Channel, ignore_signals


def main(connection: int, lifeline: int, memory: int) -> None:
    """Serve at the socket `connection` until it is closed; exit when the only process that can write to the pipe ends.

    `memory` is the file that `Blocks` maps. All three are open descriptors.
    """
    ignore_signals()
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    channel = Channel(socket.socket(fileno=connection))
    with suppress(ConnectionError):  # the batch was closed
        try:
            _serve(channel, memory)
        except ConnectionError:
            raise
        except (EnvError, WorkerError) as error:
            channel.send({"error": str(error), "blame": "user" if isinstance(error, EnvError) else "environment"})
        except BaseException:
            channel.send({"error": traceback.format_exc(), "blame": "worker"})


def _die_with_parent(lifeline: int) -> None:
    """Exit at once, even in the middle of a step, when the pipe's other end is closed."""
    os.read(lifeline, 1)  # nobody writes
    os._exit(1)


def _serve(channel: Channel, memory: int) -> None:
    task = channel.receive()
    group = EnvGroup(task["env"], range(*task["indices"]), task["replay"], task["stages"])
    try:
        channel.send(group.spec.to_json())
        channel.receive()  # all workers' environments look the same
        group.attach(Blocks(group.spec, task["num_envs"], memory))
        while True:
            for answer in group.answers(*channel.receive()):
                channel.send(answer)
    finally:
        group.close()
