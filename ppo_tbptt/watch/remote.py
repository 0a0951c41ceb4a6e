"""An environment in a process of its own.

MemoryGym's environments draw on their process's only pygame display, without a screen; a window needs it with one.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from ppo_tbptt.watch.remote import serve
serve(descriptor)
"""


class RemoteEnv:
    """What a recording needs of :class:`~ppo_tbptt.envs.SingleEnv`, done at the other end of ``connection``.

    Each call is a message of JSON, answered by one of JSON and one of bytes for each array.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def reset(self, seed: SupportsInt) -> dict[str, np.ndarray]:
        return self._ask("reset", int(seed))[0]

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Episode | None]:
        obs, (reward, terminated, truncated, episode) = self._ask("step", action.tolist())
        return obs, reward, terminated, truncated, None if episode is None else Episode(*episode)

    def render(self) -> np.ndarray | None:
        return self._ask("render")[0].get("picture")

    def _ask(self, name: str, argument: object = None) -> tuple[dict[str, np.ndarray], Any]:
        """Raises:
        EnvError, WorkerError: as the environment does, or its process has ended.
        """
        try:
            channel.send_json(self._connection, [name, argument])
            answer = channel.receive_json(self._connection)
            if "error" in answer:
                raise (EnvError if answer["by_user"] else WorkerError)(answer["error"])
            arrays = {}
            for key, dtype, shape in answer["arrays"]:
                data = channel.receive(self._connection)
                arrays[key] = np.frombuffer(bytearray(data), dtype).reshape(shape)  # writable, as torch wants it
        except channel.Closed:
            raise WorkerError("the environment's process has ended") from None
        return arrays, answer["rest"]


@contextmanager
def remote_env(config: EnvConfig) -> Iterator[RemoteEnv]:
    """Like :func:`~ppo_tbptt.watch.record.watched_env`, in another process; errors come with the first call."""
    ours, theirs = socket.socketpair()
    path = [entry or os.getcwd() for entry in sys.path]
    command = [sys.executable, "-c", BOOTSTRAP, json.dumps([path, theirs.fileno()])]
    with ours, subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(),)) as process:
        theirs.close()
        try:
            channel.send_json(ours, config.model_dump(mode="json"))
            yield RemoteEnv(ours)
        finally:
            ours.close()  # where it ends
            process.wait()


def serve(descriptor: int) -> None:
    """Answer until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the window's business
    env: SingleEnv | None = None
    with socket.socket(fileno=descriptor) as connection:
        try:
            config = EnvConfig(**channel.receive_json(connection))
            while True:
                name, argument = channel.receive_json(connection)
                try:
                    if env is None:
                        limit = config.max_episode_steps
                        env = make_env(
                            config.id, options=config.options, max_episode_steps=limit, render_mode="ground_truth"
                        )
                    _answer(connection, *_do(env, name, argument))
                except channel.Closed:
                    raise
                except Exception as error:
                    channel.send_json(connection, {"error": str(error), "by_user": isinstance(error, EnvError)})
        except channel.Closed:
            return


def _do(env: SingleEnv, name: str, argument: Any) -> tuple[dict[str, np.ndarray], Any]:
    if name == "reset":
        return env.reset(argument), None
    if name == "step":
        obs, *rest, episode = env.step(np.array(argument, np.int64))
        return obs, [*rest, None if episode is None else astuple(episode)]
    picture = env.render()
    return {} if picture is None else {"picture": picture}, None


def _answer(connection: socket.socket, arrays: dict[str, np.ndarray], rest: Any) -> None:
    described = [[key, str(array.dtype), array.shape] for key, array in arrays.items()]
    channel.send_json(connection, {"arrays": described, "rest": rest})
    for array in arrays.values():
        channel.send(connection, array.tobytes())
