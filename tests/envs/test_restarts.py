"""Restarts: what fails is made anew, what does not is left alone, and the count of failures is kept."""

import gc
import os
import signal
from typing import Any

import numpy as np
import pytest

from ppo_tbptt.envs import Restarts, VectorEnv, WorkerError

FAULTY = "fixture_envs:fixture/Faulty-v0"
ZEROS = np.zeros((4, 1), np.int64)
SEEDS = np.array([10, 11, 12, 13])
FRESH = np.array([20, 21, 22, 23])


def rows(mask: np.ndarray | None) -> list[int]:
    return [] if mask is None else np.flatnonzero(mask).tolist()


def faulty(num_workers: int, max_restarts: int = 3, **options: Any) -> VectorEnv:
    return VectorEnv(
        FAULTY, num_envs=4, num_workers=num_workers, options=options, restarts=Restarts(max_restarts), step_timeout=20
    )


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("fault", ["step_at", "exit_at", "reward_at", "obs_at", "shape_at"])
def test_a_failed_step_is_lost_where_it_failed_and_nowhere_else(num_workers: int, fault: str) -> None:
    with faulty(num_workers, **{fault: 2, "level": 12, "length": 5}) as envs:
        assert envs.reset(SEEDS) is None
        assert envs.step(ZEROS, FRESH).lost is None
        result = envs.step(ZEROS, FRESH)
        assert rows(result.lost) == ([2, 3] if num_workers == 2 else [0, 1, 2, 3])
        assert envs.restart(FRESH) is None
        result = envs.step_lost(ZEROS, FRESH)
        assert result.lost is None
        assert envs.obs["obs"][:, 0].tolist() == ([2, 2, 1, 1] if num_workers == 2 else [1] * 4), "none stepped twice"
        (fault_line,) = envs.take_faults()
        assert envs.restarts.count == 1 and envs.take_faults() == []
        assert "environment 2" in fault_line and "level seed 12" in fault_line
        assert fault_line.splitlines()[0].endswith("; restarted (1 of at most 3)")
        assert ("Traceback" in fault_line) == (fault in ("step_at", "exit_at"))
        episodes = [episode for _ in range(4) for episode in envs.step(ZEROS, FRESH).episodes]
        assert sorted((episode.seed, episode.length) for episode in episodes) == (
            [(10, 5), (11, 5), (22, 5), (23, 5)] if num_workers == 2 else [(seed, 5) for seed in FRESH]
        )


@pytest.mark.parametrize("how", ["kill_at", "hang_at"])
def test_a_worker_that_dies_or_hangs(how: str) -> None:
    with VectorEnv(
        FAULTY,
        num_envs=4,
        num_workers=2,
        options={how: 2, "level": 12},
        restarts=Restarts(1),
        step_timeout=1,
    ) as envs:
        envs.reset(SEEDS)
        before = envs.worker_pids
        envs.step(ZEROS, SEEDS)
        assert rows(envs.step(ZEROS, FRESH).lost) == [2, 3]
        assert envs.worker_pids[0] == before[0] and envs.worker_pids[1] != before[1]
        envs.restart(FRESH)
        envs.step_lost(ZEROS, FRESH)
        assert envs.obs["obs"][:, 0].tolist() == [2, 2, 1, 1]
        said = "was killed by SIGKILL" if how == "kill_at" else "did not answer within 1 s"
        assert envs.take_faults() == [f"worker 1 (environments 2 to 3) {said}; restarted (1 of at most 1)"]


@pytest.mark.parametrize("between", ["steps", "journal"])
def test_a_worker_killed_while_nothing_is_asked_of_it(between: str) -> None:
    with VectorEnv(FAULTY, num_envs=4, num_workers=2, restarts=Restarts(1), journal=True) as envs:
        envs.reset(SEEDS)
        os.kill(envs.worker_pids[0], signal.SIGKILL)
        if between == "journal":
            journals = envs.journal()
            assert [journal.hash != 0 for journal in journals] == [False, False, True, True]
            assert [journal.seed for journal in journals[2:]] == [12, 13]
        assert rows(envs.step(ZEROS, FRESH).lost) == [0, 1]
        envs.restart(FRESH)
        assert envs.step_lost(ZEROS, FRESH).lost is None and envs.restarts.count == 1
        assert [journal.seed for journal in envs.journal()] == [20, 21, 12, 13]
        assert [len(journal.actions) for journal in envs.journal()] == [1, 1, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("fault", ["reset_at", "space_at"])
def test_a_failed_reset(num_workers: int, fault: str) -> None:
    """Wherever it happens: at the beginning, at the end of an episode, in a restart."""
    with faulty(num_workers, **{fault: 0, "level": 12, "length": 1}) as envs:
        failing, others = ([2, 3], [0, 1]) if num_workers == 2 else ([0, 1, 2, 3], [])
        assert rows(envs.reset(SEEDS)) == failing
        assert rows(envs.restart(SEEDS)) == failing
        assert envs.restart(FRESH) is None
        assert envs.step(ZEROS, FRESH).episodes
        result = envs.step(ZEROS, np.array([20, 21, 12, 23]))
        assert rows(result.lost) == failing
        assert [episode.index for episode in result.episodes] == rows(result.terminated) == others


def test_idle_environments_stay_idle() -> None:
    with faulty(2, step_at=2, level=13, length=4) as envs:
        envs.reset(np.array([10, -1, -1, 13]))
        idle = np.full(4, -1)
        envs.step(ZEROS, idle)
        assert rows(envs.step(ZEROS, idle).lost) == [2, 3]
        assert envs.restart(np.array([-1, -1, -1, 21])) is None
        lengths = [(e.index, e.length) for e in envs.step_lost(ZEROS, idle).episodes]
        for _ in range(6):
            lengths += [(e.index, e.length) for e in envs.step(ZEROS, idle).episodes]
        assert lengths == [(0, 4), (3, 4)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_when_no_restarts_are_left(num_workers: int) -> None:
    envs = faulty(num_workers, step_at=1, level=12)
    envs.restarts.count = 1  # of a run that goes on
    envs.reset(SEEDS)
    result = envs.step(ZEROS, SEEDS)
    envs.restart(SEEDS)
    result = envs.step_lost(ZEROS, SEEDS)
    assert result.lost is not None and envs.restarts.count == 3
    envs.restart(SEEDS)
    says = r"(?s)environment 2 .*Traceback.*as told.*\(after 3 restarts, of which a run may have 3\)$"
    with pytest.raises(WorkerError, match=says):
        envs.step_lost(ZEROS, SEEDS)
    with pytest.raises(WorkerError, match="closed"):
        envs.step(ZEROS, SEEDS)


def test_lost_rows_wait_for_a_restart() -> None:
    with faulty(2, step_at=1, level=12) as envs:
        envs.reset(SEEDS)
        envs.step(ZEROS, SEEDS)
        for step in (2, 3):
            assert rows(envs.step(ZEROS, SEEDS).lost) == [2, 3]
            assert envs.obs["obs"][:2, 0].tolist() == [step, step]
        assert envs.restarts.count == 1


def test_a_new_worker_that_does_not_start_is_tried_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process that makes this environment fails, and the third finds another observation."""
    (tmp_path / "moody_module.py").write_text(
        "import gymnasium, pathlib\n"
        "from ppo_tbptt.envs.toy import vector_box\n"
        "from fixture_envs import Faulty\n"
        f"log = pathlib.Path({str(tmp_path / 'log')!r})\n"
        "class Moody(Faulty):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        log.write_text((log.read_text() if log.exists() else '') + 'x')\n"
        "        count = len(log.read_text())\n"
        "        if count == 2:\n"
        "            raise KeyError('moody')\n"
        "        if count == 3:\n"
        "            self.observation_space = vector_box(3)\n"
        "gymnasium.register('Moody-v0', Moody)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with VectorEnv("moody_module:Moody-v0", num_envs=1, num_workers=1, restarts=Restarts(3)) as envs:
        envs.reset(SEEDS[:1])
        os.kill(envs.worker_pids[0], signal.SIGKILL)
        result = envs.step(ZEROS[:1], SEEDS[:1])
        assert result.lost is not None and envs.restarts.count == 3
        killed, raised, other = envs.take_faults()
        assert "SIGKILL" in killed and "KeyError: 'moody'" in raised and "looks different" in other
        assert envs.restart(SEEDS[:1]) is None and envs.step_lost(ZEROS[:1], SEEDS[:1]).lost is None


def test_restarts_leave_no_descriptors_and_no_processes() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    faulty(2).close()
    gc.collect()  # what other tests have left
    before = descriptors()
    envs = faulty(2)
    envs.reset(SEEDS)
    open_ones = descriptors()
    pids = []
    for _ in range(3):
        pids += envs.worker_pids
        os.kill(envs.worker_pids[1], signal.SIGKILL)
        envs.step(ZEROS, SEEDS)
        envs.restart(SEEDS)
        assert descriptors() <= open_ones
    pids += envs.worker_pids
    envs.close()
    del envs
    assert descriptors() <= before
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
