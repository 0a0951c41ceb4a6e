"""Messages between a vector and a worker: a length and so many bytes, JSON or nothing, over a pair of sockets."""

import json
import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppo_tbptt.envs.interface import EnvSpec


@dataclass(frozen=True, slots=True)
class EnvRequest:
    """Arguments that every environment of a vector is made with, as JSON takes them. See `make_env`.

    replay: record every unfinished episode, so that it can be replayed.
    """

    env_id: str
    options: Mapping[str, Any] | None
    max_episode_steps: int | None
    replay: bool


_LENGTH = struct.Struct("<I")

STEP, BEGIN, REPLAYS, RESTORE = b"s", b"b", b"r", b"R"
"""A vector's commands. BEGIN is followed by a JSON list of (index, level seed), RESTORE by one of replays.

See `EnvGroup.answers` for the answers; any may be an error instead.
"""

EMPTY = b""


class Closed(ConnectionError):
    """The other end of the connection is gone."""


def send(connection: socket.socket, payload: bytes) -> None:
    """Send one message.

    Raises:
        Closed: nobody will receive it.
        TimeoutError: nobody took it within the connection's timeout, if it has one.
    """
    try:
        connection.sendall(_LENGTH.pack(len(payload)) + payload)
    except TimeoutError:
        raise
    except OSError as error:
        raise Closed(str(error)) from None


def receive(connection: socket.socket) -> bytes:
    """Wait for one message.

    Raises:
        Closed: none will come.
        TimeoutError: none came within the connection's timeout, if it has one.
    """
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    return _exactly(connection, size) if size else EMPTY


def send_json(connection: socket.socket, value: Any) -> None:
    """Send `value`, made of plain dicts, lists, strings and numbers, as JSON. Raises like `send`."""
    send(connection, json.dumps(value).encode())


def receive_json(connection: socket.socket) -> Any:
    """Wait for a message of JSON; None for an empty one. Raises like `receive`."""
    payload = receive(connection)
    return json.loads(payload) if payload else None


def _exactly(connection: socket.socket, size: int) -> bytes:
    chunks: list[bytes] = []
    while size:
        try:
            chunk = connection.recv(size)
        except TimeoutError:
            raise
        except OSError as error:
            raise Closed(str(error)) from None
        if not chunk:
            raise Closed("end of stream")
        chunks.append(chunk)
        size -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


_ALIGNMENT = 64


class Blocks:
    """Arrays of N environments in one mapping of memory.

    obs, final_obs: by key, `[N, ...]`.  action i64 `[N, A]`.  next_seeds i64 `[N]`.
    reward f32, terminated bool, truncated bool `[N]`.  memory u8: all of it.
    """

    def __init__(self, spec: EnvSpec, num_envs: int, memory: mmap.mmap) -> None:
        """Lay the arrays out in `memory`, which must hold `Blocks.size(...)` bytes. Writes nothing."""
        self.memory = np.frombuffer(memory, np.uint8)
        self._offset, self._num_envs = 0, num_envs
        self.obs = {key: self._take(array.shape, array.dtype) for key, array in spec.obs.items()}
        self.final_obs = {key: self._take(array.shape, array.dtype) for key, array in spec.obs.items()}
        self.action = self._take((len(spec.action_nvec),), "int64")
        self.next_seeds = self._take((), "int64")
        self.reward = self._take((), "float32")
        self.terminated = self._take((), "bool")
        self.truncated = self._take((), "bool")

    @staticmethod
    def size(spec: EnvSpec, num_envs: int) -> int:
        """Return the bytes that the arrays of `num_envs` environments take."""
        row = 2 * sum(int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize for array in spec.obs.values())
        row += 8 * len(spec.action_nvec) + 8 + 4 + 1 + 1
        return num_envs * row + _ALIGNMENT * (2 * len(spec.obs) + 5)

    def _take(self, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        full = (self._num_envs, *shape)
        array = np.ndarray(full, np.dtype(dtype), buffer=self.memory, offset=self._offset)
        self._offset += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        return array

    def poison(self) -> None:
        """Fill what environments will write with what cannot pass for it: 0xAB bytes, NaN, and True as flags."""
        for array in (*self.obs.values(), *self.final_obs.values()):
            array.fill(0xAB if array.dtype == np.uint8 else np.nan)
        self.action.fill(-1)
        self.next_seeds.fill(-1)
        self.reward.fill(np.nan)
        self.terminated.fill(True)
        self.truncated.fill(True)


def anonymous_file(size: int) -> int:
    """Open a descriptor (not inheritable) of `size` bytes of nameless memory, so that none is ever left behind."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("ppo_tbptt", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
