"""What a batch shares with its worker processes: how they are started, messages, and memory."""

import base64
import itertools
import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import xxhash

from ppo_tbptt.envs.interface import EnvSpec, Observation

SIGNALS = {signal.SIGINT, signal.SIGTERM}
"""What a terminal sends to all of its processes; only the first of them answers it."""

_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""Environment variables that keep the libraries of a process from starting a thread per core."""

_ALIGNMENT = 64


def start_process(module: str, *descriptors: int) -> "subprocess.Popen[bytes]":
    """Start a plain interpreter that calls the `main` of `module` with the open `descriptors`.

    It is neither forked (threads, CUDA) nor started by multiprocessing (which would import the user's `__main__`
    again), and imports from where this process does. `main` must call :func:`ignore_signals`.
    """
    path = [entry or os.getcwd() for entry in sys.path]
    code = f"import sys; sys.path[:] = {path!r}; from {module} import main; main(*{descriptors!r})"
    # The signals are blocked until the process ignores them: a Ctrl-C in between must not end it.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            pass_fds=descriptors,
            env={**os.environ, **_ONE_THREAD},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM in a process of :func:`start_process`, which its parent ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Channel:
    """Messages over a socket, each a line of JSON; arrays in base64.

    Both methods raise ConnectionError where the other end is gone, and TimeoutError where the socket's timeout is over.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._lines = connection.makefile("rb")

    def send(self, message: Any) -> None:
        """Send numbers, strings and arrays in lists and dicts."""
        self.socket.sendall(_encode(message).encode() + b"\n")

    def receive(self) -> Any:
        """Wait for a message."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise ConnectionResetError("end of stream")
        return _decode(line.decode())

    def close(self) -> None:
        """Close the socket. Harmless when repeated."""
        self._lines.close()
        self.socket.close()


def _from_array(value: Any) -> dict[str, Any]:
    assert isinstance(value, np.ndarray), f"no message takes a {type(value).__name__}"
    return {"dtype": value.dtype.str, "shape": value.shape, "base64": base64.b64encode(value.tobytes()).decode()}


def _to_array(data: dict[str, Any]) -> Any:
    if data.keys() != {"dtype", "shape", "base64"}:
        return data
    content = bytearray(base64.b64decode(data["base64"]))  # so that the array can be written to
    return np.frombuffer(content, data["dtype"]).reshape(data["shape"])


_encode = json.JSONEncoder(default=_from_array).encode
_decode = json.JSONDecoder(object_hook=_to_array).decode


def anonymous_file() -> int:
    """Open a file (not inheritable) of nameless memory, so that none is ever left behind."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ppo_tbptt", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Blocks:
    """Arrays of N environments in one mapping of memory.

    obs, final_obs: by key, `[N, ...]`.  hashes u64 `[N, 2]`: of the images in obs, by key.
    action i64 `[N, A]`.  next_seeds i64 `[N]`, -1 for none.  next_stages i64 `[N]`.
    reward f32, terminated bool, truncated bool `[N]`.  memory u8: all of it.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, descriptor: int = -1) -> None:
        """Map the file `descriptor`, which is made as large as it has to be, or memory of this process alone."""
        images = [key for key, array in spec.obs.items() if array.dtype == "uint8"]
        rows = [(array.shape, array.dtype) for array in spec.obs.values()] * 2 + [((2,), "uint64")] * len(images)
        rows += [((len(spec.action_nvec),), "int64"), ((), "int64"), ((), "int64")]
        rows += [((), "float32"), ((), "bool"), ((), "bool")]
        sizes = [num_envs * math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in rows]
        offsets = [0, *itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
        if descriptor >= 0:
            os.ftruncate(descriptor, offsets[-1])
        self.memory = np.frombuffer(mmap.mmap(descriptor, offsets[-1]), np.uint8)
        self._arrays = [
            np.ndarray((num_envs, *shape), dtype, self.memory, offset)
            for (shape, dtype), offset in zip(rows, offsets, strict=False)
        ]
        *observations, self.action, self.next_seeds, self.next_stages = self._arrays[:-3]
        self.reward, self.terminated, self.truncated = self._arrays[-3:]
        self.obs = dict(zip(spec.obs, observations, strict=False))
        self.final_obs = dict(zip(spec.obs, observations[len(spec.obs) :], strict=False))
        self.hashes = dict(zip(images, observations[2 * len(spec.obs) :], strict=True))

    def show(self, index: int, obs: Observation | None) -> None:
        """Write what environment `index` shows, with hashes; None is all zero."""
        for key, array in self.obs.items():
            array[index] = 0 if obs is None else obs[key]
        for key, hashes in self.hashes.items():
            hashes[index] = np.frombuffer(xxhash.xxh3_128_digest(self.obs[key][index]), np.uint64)

    def poison(self) -> None:
        """Fill everything with what cannot pass for data: 0xAB bytes, NaN, -1, and True as flags."""
        for array in self._arrays:
            array.fill({"u": 0xAB, "f": np.nan, "i": -1, "b": True}[array.dtype.kind])
