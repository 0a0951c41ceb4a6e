"""Worker processes: their failures are reported in full, and nothing outlives its vector."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels

from ppo_tbptt.envs import EnvError, FaultBudget, VectorEnv, WorkerError

FAULTY = "fixture_envs:fixture/Faulty-v0"
ZEROS = np.zeros((4, 1), np.int64)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def faulty(num_workers: int, budget: int = 0, **options: int) -> VectorEnv:
    levels, faults = GivenLevels([10, 11, 12, 13]), FaultBudget(budget)
    return VectorEnv(FAULTY, num_envs=4, num_workers=num_workers, levels=levels, faults=faults, options=options)


def test_a_worker_that_fails_outside_of_its_environments_says_why() -> None:
    envs = faulty(2, fatal_at=1)
    envs.reset()
    pids = envs.worker_pids
    with pytest.raises(WorkerError, match=r"(?s)worker 0 \(environments 0 to 1\) failed:\nTraceback.*not even an Exc"):
        envs.step(ZEROS)
    assert not any(alive(pid) for pid in pids), "without a budget of faults the first one is the end"
    with pytest.raises(WorkerError, match="closed"):
        envs.reset()


def test_close_ends_even_a_worker_in_the_middle_of_a_step() -> None:
    envs = faulty(2, hang_at=1)
    envs.reset()
    pids = envs.worker_pids
    envs.send(ZEROS)
    start = time.monotonic()
    envs.close()
    envs.close()
    assert time.monotonic() - start < 8
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "neither a process nor a zombie"


def test_nothing_is_left_of_workers() -> None:
    """Of those that were killed, where environments cannot be made, and of a vector that is forgotten."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    faulty(2).close()
    gc.collect()  # what other tests have left
    before = descriptors()
    envs = faulty(2, budget=3)
    envs.reset()
    open_ones, pids = descriptors(), []
    for _ in range(3):
        pids += envs.worker_pids
        os.kill(envs.worker_pids[1], signal.SIGKILL)
        envs.step(ZEROS)
        assert descriptors() <= open_ones
    pids += envs.worker_pids
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 1.5
    with pytest.raises(EnvError):
        VectorEnv("Nothing-v0", num_envs=2, num_workers=2, levels=GivenLevels([1, 2]))
    envs = faulty(2)
    pids += envs.worker_pids
    del envs
    gc.collect()
    assert descriptors() <= before
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


SCRIPT = """
import json, signal, sys, time
import numpy as np
from ppo_tbptt.envs import LevelSeeds, VectorEnv
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(True))
options = json.loads(sys.argv[1])
kwargs = {"num_envs": 4, "num_workers": 2, "levels": LevelSeeds(0, 4, 0, 100), "options": options}
vectors = [VectorEnv("fixture_envs:fixture/Faulty-v0", **kwargs) for _ in range(2)]
action = np.zeros((4, 1), int)
for envs in vectors:
    envs.reset()
pids = [pid for envs in vectors for pid in envs.worker_pids]
for envs in vectors:
    envs.send(action)
print(json.dumps(pids), flush=True)
while not asked:
    for envs in vectors:
        envs.receive()
        envs.send(action)
for envs in vectors:
    envs.receive()
    envs.step(action)
print("still there", flush=True)
"""


def start(tmp_path: Path, **options: Any) -> tuple[subprocess.Popen[str], list[int]]:
    script = tmp_path / "script.py"  # without a __main__ guard
    script.write_text(SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    command = [sys.executable, str(script), json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 4 and all(alive(pid) for pid in pids)
    return process, pids


@pytest.mark.parametrize("options", [{}, {"hang_at": 3}], ids=["stepping", "hanging"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, options: dict[str, int]) -> None:
    process, pids = start(tmp_path, **options)
    try:
        time.sleep(0.3)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        while any(alive(pid) for pid in pids):  # or the test's time is over
            time.sleep(0.01)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


def test_signals_of_the_terminal_are_the_parents_business(tmp_path: Path) -> None:
    process, pids = start(tmp_path)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    assert all(alive(pid) for pid in pids)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert out == "still there\n" and process.returncode == 0
    assert not any(alive(pid) for pid in pids)
