"""Worker processes: their failures are reported in full, and nothing outlives its vector."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels

from ppo_tbptt.envs import EnvError, VectorEnv, WorkerError

FAULTY = "fixture_envs:fixture/Faulty-v0"
ZEROS = np.zeros((4, 1), np.int64)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def faulty(num_workers: int, step_timeout: float | None = None, **options: int) -> VectorEnv:
    levels = GivenLevels([10, 11, 12, 13])
    kwargs: dict[str, Any] = {"options": options, "levels": levels, "step_timeout": step_timeout}
    return VectorEnv(FAULTY, num_envs=4, num_workers=num_workers, **kwargs)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"step_at": 2},
            r"environment 0 \(fixture_envs:fixture/Faulty-v0, level seed 10, step 1\) raised in its step:\nTraceback",
        ),
        ({"reward_at": 2}, "environment 0: fixture_envs:fixture/Faulty-v0, level seed 10, step 2: the reward is nan"),
        ({"obs_at": 2}, "level seed 10, step 2: observation 'obs' is not finite"),
        ({"reset_at": 1}, "raised in its reset to level seed 10:\nTraceback"),
        ({"shape_at": 2}, r"step 2: observation 'obs' is float32 of shape \(3,\), its space says"),
        ({"space_at": 1}, r"the action space has changed from Discrete\(2\) to Discrete\(3\)"),
        ({"exit_at": 2}, r"(?s)step 1\) raised in its step:\nTraceback.*SystemExit: as told"),
    ],
)
def test_failures_are_told_in_full(num_workers: int, options: dict[str, int], says: str) -> None:
    envs = faulty(num_workers, **options)
    pids = envs.worker_pids

    def run() -> None:
        envs.reset()
        for _ in range(3):
            envs.step(ZEROS)

    with pytest.raises(WorkerError, match=says) as caught:
        run()
    if "Traceback" in says:
        assert "as told" in str(caught.value) and "fixture_envs.py" in str(caught.value)
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(WorkerError, match="closed"):
        envs.reset()


def test_a_killed_worker_is_named() -> None:
    envs = faulty(2)
    envs.reset()
    os.kill(envs.worker_pids[1], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"worker 1 \(environments 2 to 3\) was killed by SIGKILL"):
        envs.step(ZEROS)
    assert not any(alive(pid) for pid in envs.worker_pids)


def test_a_worker_that_fails_outside_of_its_environments_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fatal_module.py").write_text(
        "import gymnasium\n"
        "from fixture_envs import Faulty\n"
        "class Fatal(Faulty):\n"
        "    def step(self, action):\n"
        "        raise BaseException('not even an Exception')\n"
        "gymnasium.register('Fatal-v0', Fatal)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    envs = VectorEnv("fatal_module:Fatal-v0", num_envs=4, num_workers=2, levels=GivenLevels([10, 11, 12, 13]))
    envs.reset()
    with pytest.raises(WorkerError, match=r"(?s)worker 0 \(environments 0 to 1\) failed:\nTraceback.*not even an Exc"):
        envs.step(ZEROS)


def test_a_worker_that_hangs_is_killed() -> None:
    envs = faulty(2, step_timeout=1, hang_at=2, level=12)
    envs.reset()
    pids = envs.worker_pids
    envs.step(ZEROS)
    with pytest.raises(WorkerError, match=r"worker 1 \(environments 2 to 3\) did not answer within 1 s"):
        envs.step(ZEROS)
    assert not any(alive(pid) for pid in pids)


def test_constructor_that_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text(
        "import gymnasium\n"
        "class Broken(gymnasium.Env):\n"
        "    def __init__(self):\n"
        "        raise KeyError('in the constructor')\n"
        "gymnasium.register('Broken-v0', Broken)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for num_workers in (0, 2):
        with pytest.raises(EnvError, match="its constructor raised KeyError") as caught:
            VectorEnv("broken_module:Broken-v0", num_envs=2, num_workers=num_workers, levels=GivenLevels([1, 2]))
        assert "in the constructor" in str(caught.value) and "broken_module.py" in str(caught.value)


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


def test_close_is_quick_and_leaves_no_descriptors() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    faulty(2).close()
    before = descriptors()
    envs = faulty(3)
    envs.reset()
    start = time.monotonic()
    envs.close()
    assert time.monotonic() - start < 1.5
    assert not any(Path(f"/proc/{pid}").exists() for pid in envs.worker_pids)
    with pytest.raises(EnvError):
        VectorEnv("Nothing-v0", num_envs=2, num_workers=2, levels=GivenLevels([1, 2]))
    del envs
    assert descriptors() <= before


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
    process = subprocess.Popen(
        [sys.executable, str(script), json.dumps(options)],
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 4 and all(alive(pid) for pid in pids)
    return process, pids


@pytest.mark.parametrize("options", [{}, {"hang_at": 3}], ids=["stepping", "hanging"])
def test_workers_die_with_a_killed_parent(tmp_path: Path, options: dict[str, int]) -> None:
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    process, pids = start(tmp_path, **options)
    try:
        time.sleep(0.3)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        assert wait_for(lambda: not any(alive(pid) for pid in pids))
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
    left = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not [name for name in left - before if "ppo" in name or "psm" in name]


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
