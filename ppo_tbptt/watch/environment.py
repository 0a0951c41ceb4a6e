"""Environments to watch, in this process or in one of their own.

A process has one pygame display: MemoryGym's environments use it without a screen, a window needs it with one.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, SupportsInt

import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import EnvError, Episode, SingleEnv, WorkerError, make_env
from ppo_tbptt.envs.workers.ipc import Channel, ignore_signals, start_process


def watched_env(config: EnvConfig, previous: Sequence[str] = ()) -> closing[SingleEnv]:
    """Make the environment, rendering the ground truth where it can; to be used in a ``with`` statement.

    ``previous`` is the agent's attribute of that name.

    Raises:
        EnvError: the environment cannot be made.
    """
    options, limit = config.options, config.max_episode_steps
    how: dict[str, Any] = {"options": options, "max_episode_steps": limit, "previous": previous}
    return closing(make_env(config.id, render_mode="ground_truth", **how))


class RemoteEnv:
    """The part of :class:`~ppo_tbptt.envs.SingleEnv` that a recording needs, executed by the process at ``channel``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def reset(self, seed: SupportsInt) -> dict[str, np.ndarray]:
        """Reset to level ``seed`` and return the observation."""
        return self._ask("reset", int(seed))

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, Episode | None]:
        """Return observation, reward, terminated, truncated, and the episode if it has ended."""
        *outcome, episode = self._ask("step", action)
        return *outcome, None if episode is None else Episode(*episode)

    def render(self) -> np.ndarray | None:
        """Return the ground truth, u8 ``[height, width, 3]``, or None without one."""
        return self._ask("render")

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the environment.

        Raises:
            EnvError: raised by the environment.
            WorkerError: the environment raised something else, or its process has ended.
        """
        try:
            self._channel.send([method, *arguments])
            reply = self._channel.receive()
        except ConnectionError:
            raise WorkerError("the environment's process has ended") from None
        if "error" in reply:
            raise (EnvError if reply["by_user"] else WorkerError)(reply["error"])
        return reply["result"]


Env = SingleEnv | RemoteEnv


@contextmanager
def remote_env(config: EnvConfig, previous: Sequence[str] = ()) -> Iterator[RemoteEnv]:
    """Make the environment of :func:`watched_env` in another process; the first call raises its errors."""
    ours, theirs = socket.socketpair()
    with start_process("ppo_tbptt.watch.environment", theirs.fileno()), closing(Channel(ours)) as channel:
        theirs.close()
        channel.send([config.model_dump(mode="json"), list(previous)])
        yield RemoteEnv(channel)


def main(connection: int) -> None:
    """Execute the calls that arrive at the socket ``connection`` until its other end is closed."""
    ignore_signals()
    env: SingleEnv | None = None
    with closing(Channel(socket.socket(fileno=connection))) as channel, suppress(ConnectionError), ExitStack() as stack:
        tree, previous = channel.receive()
        config = EnvConfig(**tree)
        while True:
            method, *arguments = channel.receive()
            try:
                env = env or stack.enter_context(watched_env(config, previous))
                result = getattr(env, method)(*arguments)
                if method == "step":
                    *outcome, episode = result
                    result = [*outcome, None if episode is None else episode.values()]
            except Exception as error:
                channel.send({"error": str(error), "by_user": isinstance(error, EnvError)})
            else:
                channel.send({"result": result})
