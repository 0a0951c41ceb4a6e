"""TensorBoard event files: append events, read them, and remove those after a resumed checkpoint.

TensorBoard's own writer writes in a thread. After a failed write (a full disk) it loses its queue, leaves half a record
in the file and fails for good.
"""

# pyright: reportAttributeAccessIssue=false
# protobuf creates its classes at import.

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.summary.writer.record_writer import RecordWriter

from ppo_tbptt.run.files import AppendFile, replacing

PATTERN = "events.out.tfevents.*"


class EventFile(AppendFile):
    """A new event file, created with its first event.

    Args:
        folder: folder of the file.
        purge_from: first step of earlier events that readers discard. The first file of a folder is marked with 0,
            because readers ignore the first mark that they meet.
    """

    def __init__(self, folder: Path, *, purge_from: int | None = None) -> None:
        if purge_from is None and not any(folder.glob(PATTERN)):
            purge_from = 0
        head = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            start = SessionLog(status=SessionLog.START)
            head += _record(Event(wall_time=time.time(), step=purge_from, session_log=start))
        super().__init__(folder / _new_name(folder), head)

    def add(self, content: Summary, step: int) -> None:
        """Append an event. Raises like `append`."""
        self.append(_record(Event(wall_time=time.time(), step=step, summary=content)))


def read_events(path: Path) -> Iterator[tuple[Event, bytes]]:
    """Yield each event with its record, up to the first incomplete record (of a killed run).

    A record is u64 length, u32 checksum of the length, the event, u32 checksum of the event. The event's checksum is
    not verified, because that is slow.
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
    """Remove incomplete records, and events that ``keep`` rejects, from the event files of ``folder``.

    Raises:
        OSError: a file can't be read or replaced; it is unchanged.
    """
    for path in folder.glob(PATTERN):
        kept = [record for event, record in read_events(path) if keep(event)]
        if sum(map(len, kept)) < path.stat().st_size:
            with replacing(path) as file:
                file.writelines(kept)


def _new_name(folder: Path) -> str:
    """Return a file name that sorts last, whatever the clock says, because readers sort files by name."""
    seconds = [path.name.removeprefix(PATTERN[:-1]).split(".")[0] for path in folder.glob(PATTERN)]
    newest = max((int(text) for text in seconds if text.isdecimal()), default=0)
    return f"{PATTERN[:-1]}{max(int(time.time()), newest + 1):010d}.{socket.gethostname()}.{os.getpid()}"


def _record(event: Event) -> bytes:
    buffer = BytesIO()
    RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()
