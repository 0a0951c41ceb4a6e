"""TensorBoard's event files: appended to, and cut where a run goes on from an earlier checkpoint.

TensorBoard's own writer hands its records to a thread. When a write fails there (a full disk), that thread prints a
traceback and ends, up to a whole queue of records is lost, the file keeps half a record, and every later call raises
the same error for good. Here a record is written at once, in one piece or not at all.
"""

# pyright: reportAttributeAccessIssue=false
# protobuf makes its classes when they are imported.

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from io import BytesIO, FileIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from ppo_tbptt.run.files import replacing

PATTERN = "events.out.tfevents.*"


class EventFile:
    """A new event file in ``folder``; nothing is written before the first record.

    ``purge_from``: what readers have seen from this step on is void. The first file of a folder has such a mark too,
    for readers take the first that they meet for the very start, and void nothing.
    """

    def __init__(self, folder: Path, *, purge_from: int | None = None) -> None:
        if purge_from is None and not any(folder.glob(PATTERN)):
            purge_from = 0
        self.path = folder / _new_name(folder)
        self._head = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            self._head += _record(Event(wall_time=time.time(), step=purge_from, session_log=start))
        self._file: FileIO | None = None
        self._size = 0  # of the whole records that are in it

    def append(self, event: Event) -> None:
        """Raises:
        OSError: nothing of the event was written. A later call starts where the last whole record ends.
        """
        try:
            file = self._open()
            left = memoryview((b"" if self._size else self._head) + _record(event))
            size = self._size + len(left)
            while left:
                left = left[file.write(left) :]
            self._size = size
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _open(self) -> FileIO:
        """At the end of the last whole record: a failed write may have left a part of one behind it."""
        if self._file is None:
            self._file = FileIO(self.path, "a")
            self._size = min(self._size, os.fstat(self._file.fileno()).st_size)
            self._file.truncate(self._size)
        return self._file

    def close(self) -> None:
        """Never raises: all that was promised is written. May be called again; :meth:`append` opens anew."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.truncate(self._size)
                file.close()
            except OSError:
                pass


def read_events(path: Path) -> Iterator[tuple[Event, bytes]]:
    """The events of a file with their records; a torn end (of a killed run) is left out.

    A record is u64 length, u32 checksum of it, the event, u32 checksum of that. The last is not looked at: it is slow.
    """
    data = path.read_bytes()
    at = 0
    while len(data) - at >= 16:
        length, checksum = struct.unpack_from("<QI", data, at)
        end = at + 16 + length
        if checksum != masked_crc32c(data[at : at + 8]) or end > len(data):
            return
        yield Event.FromString(data[at + 12 : end - 4]), data[at:end]
        at = end


def filter_events(folder: Path, keep: Callable[[Event], bool]) -> None:
    """Leave only whole events, and those to ``keep``, in the files of ``folder``.

    Raises:
        OSError: a file can't be read or replaced; it is as it was.
    """
    for path in folder.glob(PATTERN):
        kept = [record for event, record in read_events(path) if keep(event)]
        if sum(map(len, kept)) < path.stat().st_size:
            with replacing(path) as file:
                file.writelines(kept)


def _new_name(folder: Path) -> str:
    """Readers take the files in the order of their names, so a new one sorts last whatever the clock says."""
    seconds = [path.name.removeprefix(PATTERN[:-1]).split(".")[0] for path in folder.glob(PATTERN)]
    newest = max((int(text) for text in seconds if text.isdecimal()), default=0)
    return f"{PATTERN[:-1]}{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}"


def _record(event: Event) -> bytes:
    buffer = BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
