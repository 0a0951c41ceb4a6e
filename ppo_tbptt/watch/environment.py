"""Environments to watch, in this process or in one of their own.

A process has one pygame display: MemoryGym's environments use it without a screen, a window needs it with one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import astuple
from typing import Any, SupportsInt

import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvError, Episode, SingleEnv, WorkerError, make_env
from ppo_tbptt.envs.workers import ipc as channel

BOOTSTRAP = """\
import json, sys
path, descriptor = json.loads(sys.argv[1])
sys.path[:] = path
from ppo_tbptt.watch.environment import serve
serve(descriptor)
"""


def watched_env(config: EnvConfig) -> closing[SingleEnv]:
    """Make the environment, rendering the ground truth where it can; to be used in a ``with`` statement.

    Raises:
        EnvError: the environment cannot be made.
    """
    options, limit = config.options, config.max_episode_steps
    return closing(make_env(config.id, options=options, max_episode_steps=limit, render_mode="ground_truth"))


class RemoteEnv:
    """The part of :class:`~ppo_tbptt.envs.SingleEnv` that a recording needs, executed by the process at ``connection``.

    Each call is one JSON message. Its reply is one JSON message and the bytes of each array.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def reset(self, seed: SupportsInt) -> dict[str, np.ndarray]:
        """Reset to level ``seed`` and return the observation."""
        return self._ask("reset", int(seed))[0]

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Episode | None]:
        """Return observation, reward, terminated, truncated, and the episode if it has ended."""
        obs, (reward, terminated, truncated, episode) = self._ask("step", action.tolist())
        return obs, reward, terminated, truncated, None if episode is None else Episode(*episode)

    def render(self) -> np.ndarray | None:
        """Return the ground truth, u8 ``[height, width, 3]``, or None without one."""
        return self._ask("render")[0].get("picture")

    def _ask(self, name: str, argument: object = None) -> tuple[dict[str, np.ndarray], Any]:
        """Send a call and return the arrays and the other values of its reply.

        Raises:
            EnvError: raised by the environment.
            WorkerError: the environment raised something else, or its process has ended.
        """
        try:
            channel.send_json(self._connection, [name, argument])
            reply = channel.receive_json(self._connection)
            if "error" in reply:
                raise (EnvError if reply["by_user"] else WorkerError)(reply["error"])
            arrays = {}
            for key, dtype, shape in reply["arrays"]:
                data = channel.receive(self._connection)
                arrays[key] = np.frombuffer(bytearray(data), dtype).reshape(shape)  # writable, as torch wants it
        except channel.Closed:
            raise WorkerError("the environment's process has ended") from None
        return arrays, reply["rest"]


Env = SingleEnv | RemoteEnv


@contextmanager
def remote_env(config: EnvConfig) -> Iterator[RemoteEnv]:
    """Make the environment of :func:`watched_env` in another process; the first call raises its errors."""
    ours, theirs = socket.socketpair()
    path = [entry or os.getcwd() for entry in sys.path]
    command = [sys.executable, "-c", BOOTSTRAP, json.dumps([path, theirs.fileno()])]
    with ours, subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        try:
            channel.send_json(ours, config.model_dump(mode="json"))
            yield RemoteEnv(ours)
        finally:
            ours.close()  # ends the process
            process.wait()


def serve(descriptor: int) -> None:
    """Execute the calls that arrive at the socket ``descriptor`` until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the window handles Ctrl-C
    env: SingleEnv | None = None
    with socket.socket(fileno=descriptor) as connection, suppress(channel.Closed), ExitStack() as stack:
        config = EnvConfig(**channel.receive_json(connection))
        while True:
            name, argument = channel.receive_json(connection)
            try:
                env = env or stack.enter_context(watched_env(config))
                arrays, rest = _execute(env, name, argument)
            except Exception as error:
                channel.send_json(connection, {"error": str(error), "by_user": isinstance(error, EnvError)})
            else:
                _reply(connection, arrays, rest)


def _execute(env: SingleEnv, name: str, argument: Any) -> tuple[dict[str, np.ndarray], Any]:
    if name == "reset":
        return env.reset(argument), None
    if name == "step":
        obs, *rest, episode = env.step(np.array(argument, np.int64))
        return obs, [*rest, None if episode is None else astuple(episode)]
    picture = env.render()
    return {} if picture is None else {"picture": picture}, None


def _reply(connection: socket.socket, arrays: dict[str, np.ndarray], rest: Any) -> None:
    described = [[key, str(array.dtype), array.shape] for key, array in arrays.items()]
    channel.send_json(connection, {"arrays": described, "rest": rest})
    for array in arrays.values():
        channel.send(connection, array.tobytes())
