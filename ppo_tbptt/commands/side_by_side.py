"""Jobs side by side, each in a process of its own with one thread, so that every core learns something else."""

import signal
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib import import_module
from select import select
from subprocess import Popen
from time import monotonic
from typing import Any, NamedTuple

from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.envs.workers.ipc import Channel, start_process
from ppo_tbptt.runtime.errors import InputError, RunError

Ask = Callable[[Any], Any]
"""Sends a question to the process that started the job, and returns its answer; None where that process is gone."""


class Job(NamedTuple):
    """What one process does: ``work(message, stop, ask)`` of a module, which returns the process's exit code.

    ``message`` is of lists, dicts, text and numbers. ``stop`` is a :class:`Stop` to look at now and then.
    """

    name: str
    message: Any


class _Process(NamedTuple):
    job: Job
    process: "Popen[bytes]"
    began: float


def run_side_by_side(
    module: str,
    next_job: Callable[[], Job | None],
    number: int,
    stop: Stop,
    *,
    ended: Callable[[Job, float, int], None],
    answer: Callable[[Job, Any], Any] = lambda job, question: None,
) -> None:
    """Run the jobs of ``module`` until there is none left, or ``stop`` says so, with ``number`` of them at a time.

    With 0 they run one after the other in this process. On a stop all are told to stop too, and waited for.

    Args:
        module: whose function ``work`` does a job.
        next_job: is called whenever a place is free; None where there is nothing to begin at present.
        number: of processes.
        stop: the signals and the time budget of this process.
        ended: is called with each job that ended by itself, its seconds, and its exit code (negative: the signal that
            killed its process). Not called for a job that was stopped.
        answer: answers a job's question.
    """
    if not number:
        while not stop.code() and (job := next_job()) is not None:
            began = monotonic()
            code = _work(module, job, stop, partial(answer, job))
            if not (code and stop.code()):
                ended(job, monotonic() - began, code)
        return
    running: dict[Channel, _Process] = {}
    try:
        while not stop.code():
            while len(running) < number and (job := next_job()) is not None:
                channel, process = _start(module, job)
                running[channel] = _Process(job, process, monotonic())
            if not running:
                return
            ready = select([channel.socket for channel in running], [], [], 0.1)[0]
            for channel in [channel for channel in running if channel.socket in ready]:
                job, process, began = running[channel]
                try:
                    channel.send(answer(job, channel.receive()))
                except ConnectionError:  # it has closed its end, as all processes do when they end
                    code = process.wait()
                    channel.close()
                    del running[channel]
                    ended(job, monotonic() - began, code)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for channel, (_, process, _) in running.items():
            channel.close()  # a question is not answered any more
            process.wait()
        for job, process, began in running.values():
            if process.returncode == 0:
                ended(job, monotonic() - began, 0)


def _start(module: str, job: Job) -> tuple[Channel, "Popen[bytes]"]:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        process = start_process(__name__, theirs.fileno())
    channel.send([module, *job])
    return channel, process


def _work(module: str, job: Job, stop: Stop, ask: Ask) -> int:
    """Do the job; what ends a command with one line ends a job so too, and leaves the others alone."""
    try:
        return import_module(module).work(job.message, stop, ask)
    except (InputError, RunError) as error:
        print(f"error: {job.name}: {error}", file=sys.stderr)
        return 1


class _StopWithParent(Stop):
    """Stops on SIGTERM, and where the process at the other end of the channel is gone."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(quiet=True)
        self._channel = channel

    def code(self, ahead: float = 0.0) -> int:
        # Outside of `ask` nothing comes over the channel but its end.
        gone = bool(select([self._channel.socket], [], [], 0)[0])
        return super().code(ahead) or (128 + signal.SIGTERM if gone else 0)


def main(connection: int) -> None:
    """Do the job that the parent names."""
    channel = Channel(socket.socket(fileno=connection))

    def ask(question: Any) -> Any:
        try:
            channel.send(question)
            return channel.receive()
        except ConnectionError:
            return None

    with closing(channel), _StopWithParent(channel) as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            module, *job = channel.receive()
        except ConnectionError:
            sys.exit(1)
        sys.exit(_work(module, Job(*job), stop, ask))
