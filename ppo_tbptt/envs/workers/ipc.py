"""Messages between a vector and a worker: a length and so many bytes, JSON or nothing, over a pair of sockets."""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("<I")

RESET, STEP, JOURNAL, RESTORE = b"r", b"s", b"j", b"R"
"""What a vector asks for; RESTORE is followed by JSON. See `EnvGroup.answers` for what it gets, or it is an error."""

EMPTY = b""


class Closed(ConnectionError):
    """The other side is gone."""


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
