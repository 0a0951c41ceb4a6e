"""Event files under failing writes, and cut where a run goes on."""

# pyright: reportAttributeAccessIssue=false

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.compat.proto.summary_pb2 import Summary

from ppo_tbptt.run.event_files import EventFile, filter_events, read_events

# The system refuses to let the file grow past its limit, as a full disk would: with a short write, then an error.
FULL = """
import json, resource, sys
from pathlib import Path
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.tensorboard import TensorBoard

board = TensorBoard(Path(sys.argv[1]))
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
errors = []
for step in range(30):
    if step in (10, 25):
        (path,) = Path(sys.argv[1]).iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 40, unlimited[1]))
    if step == 20:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    try:
        board.write(Report(iteration=step, env_steps=step, scalars={"loss/total": 0.5, "x" * 50: 1.0}))
    except OSError as error:
        errors.append([step, error.strerror, error.filename])
board.close()
board.close()
print(json.dumps(errors))
"""


def test_what_a_full_disk_refuses_is_written_later(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (path,) = tmp_path.iterdir()
    assert json.loads(done.stdout) == [[step, "File too large", str(path)] for step in (*range(10, 20), *range(25, 30))]
    events = list(read_events(path))
    assert [event.step for event, _ in events[2:]] == list(range(25))  # after the header
    assert sum(len(record) for _, record in events) == path.stat().st_size  # and no half record anywhere


def steps(folder: Path) -> list[list[int]]:
    return [[event.step for event, _ in read_events(path) if event.step] for path in sorted(folder.iterdir())]


def test_cut(tmp_path: Path) -> None:
    for first in (1, 3):
        file = EventFile(tmp_path)
        for step in (first, first + 1):
            file.add(Summary(), step)
        file.close()
    old, new = sorted(tmp_path.iterdir())
    with new.open("ab") as torn:
        torn.write(b"\x05\0\0")
    assert steps(tmp_path) == [[1, 2], [3, 4]]
    untouched = old.stat().st_ino
    filter_events(tmp_path, lambda event: event.step <= 3)
    assert steps(tmp_path) == [[1, 2], [3]]
    assert old.stat().st_ino == untouched
    assert new.stat().st_size == sum(len(record) for _, record in read_events(new))


def test_a_file_that_is_not_one_of_events_holds_none(tmp_path: Path) -> None:
    for content in (b"", b"hello", bytes(100), b"a line of text that is longer than a header\n" * 3):
        (tmp_path / "file").write_bytes(content)
        assert list(read_events(tmp_path / "file")) == []


def test_a_new_file_sorts_last_whatever_the_clock_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for now in (2e9, 1e9, 1e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        file = EventFile(tmp_path)
        file.add(Summary(), 1)
        file.close()
        paths.append(file.path)
    assert sorted(tmp_path.iterdir()) == paths
