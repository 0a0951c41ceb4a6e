"""An environment in a process of its own.

MemoryGym's environments draw on their process's only pygame display, without a screen; a window needs it with one.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, SupportsInt

import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import Episode, WorkerError, make_env


class RemoteEnv:
    """What a recording needs of :class:`~ppo_tbptt.envs.SingleEnv`, done at the other end of ``connection``."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def reset(self, seed: SupportsInt) -> dict[str, np.ndarray]:
        return self._ask("reset", int(seed))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Episode | None]:
        return self._ask("step", action)

    def render(self) -> np.ndarray | None:
        return self._ask("render")

    def _ask(self, name: str, *arguments: object) -> Any:
        """Raises:
        EnvError, WorkerError: as the environment does, or its process has ended.
        """
        try:
            self._connection.send((name, arguments))
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise WorkerError("the environment's process has ended") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextmanager
def remote_env(config: EnvConfig) -> Iterator[RemoteEnv]:
    """Like :func:`~ppo_tbptt.watch.record.watched_env`, in another process; errors come with the first call."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit the window
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, config), daemon=True)
    process.start()
    theirs.close()
    try:
        yield RemoteEnv(ours)
    finally:
        ours.close()  # where it ends
        process.join()


def _serve(connection: Connection, config: EnvConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the window's business
    env = error = None
    try:
        options, limit = config.options, config.max_episode_steps
        env = make_env(config.id, options=options, max_episode_steps=limit, render_mode="ground_truth")
    except Exception as caught:
        error = caught
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(error or getattr(env, name)(*arguments))
        except Exception as caught:
            connection.send(caught)
