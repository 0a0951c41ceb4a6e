"""Faults: a failing environment costs its own episode a step, a dead process those of its environments."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels

from ppo_tbptt.envs import FaultBudget, StepResult, VectorEnv, WorkerError

FAULTY = "fixture_envs:fixture/Faulty-v0"
ZEROS = np.zeros((4, 1), np.int64)
SEEDS, FRESH = [10, 11, 12, 13], [20, 21, 22, 23]


def faulty(num_workers: int, *rounds: list[int], **options: Any) -> VectorEnv:
    levels, faults = GivenLevels(*(rounds or (SEEDS, FRESH))), FaultBudget(3)
    kwargs: dict[str, Any] = {"num_workers": num_workers, "options": options, "replay": True, "step_timeout": 20}
    return VectorEnv(FAULTY, num_envs=4, levels=levels, faults=faults, **kwargs)


def failed(result: StepResult) -> list[int]:
    return [] if result.failed is None else np.flatnonzero(result.failed).tolist()


RAISED = r"environment 2 \(fixture_envs:fixture/Faulty-v0, level seed 12, step 1\) raised in its step; made anew"


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("step_at", RAISED + r" .*\nTraceback(?s:.*)fixture_envs.py(?s:.*)RuntimeError: as told, in step"),
        ("exit_at", RAISED + r" .*\nTraceback(?s:.*)SystemExit: as told"),
        ("reward_at", "environment 2: .*, level seed 12, step 2: the reward is nan, .*; made anew"),
        ("obs_at", "level seed 12, step 2: observation 'obs' is not finite"),
        ("shape_at", r"step 2: observation 'obs' is float32 of shape \(3,\), its space says"),
    ],
)
def test_an_environment_that_fails_is_made_anew_alone(num_workers: int, fault: str, says: str) -> None:
    with faulty(num_workers, **{fault: 2, "level": 12, "length": 5}) as envs:
        envs.reset()
        pids = envs.worker_pids
        assert failed(envs.step(ZEROS)) == []
        result = envs.step(ZEROS)
        assert failed(result) == [2] and result.episodes == []
        assert (result.reward[2], result.terminated[2], result.truncated.tolist()) == (0, False, [0, 0, 1, 0])
        assert envs.obs["obs"].tolist() == [[2, 10], [2, 11], [0, 22], [2, 13]], "none steps twice"
        assert envs.worker_pids == pids
        (text,) = result.faults
        assert re.search(says, text)
        assert "(1 of at most 3)" in text.splitlines()[0]
        results = [envs.step(ZEROS) for _ in range(5)]
        assert all(failed(result) == [] and result.faults == () for result in results)
        episodes = [episode for result in results for episode in result.episodes]
        assert sorted((episode.seed, episode.length) for episode in episodes) == [(10, 5), (11, 5), (13, 5), (22, 5)]


def test_a_worker_killed_while_nothing_is_asked_of_it() -> None:
    with faulty(2) as envs:
        envs.reset()
        os.kill(envs.worker_pids[0], signal.SIGKILL)
        state = envs.state_dict()
        assert (state["digest"] != 0).tolist() == [False, False, True, True]
        assert state["seed"][2:].tolist() == [12, 13]
        result = envs.step(ZEROS)
        assert failed(result) == [0, 1] and len(result.faults) == 1
        assert envs.obs["obs"].tolist() == [[0, 20], [0, 21], [1, 12], [1, 13]]
        state = envs.state_dict()
        assert (state["seed"].tolist(), state["steps"].tolist()) == ([20, 21, 12, 13], [0, 0, 1, 1])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("reset_at", r"raised in its reset to level seed 12; .*\nTraceback"),
        ("space_at", r"the action space has changed from Discrete\(2\) to Discrete\(3\)"),
    ],
)
def test_a_reset_that_fails_is_tried_with_the_next_level(num_workers: int, fault: str, says: str) -> None:
    """At the beginning, and at an episode's end, which counts all the same."""
    rounds = [SEEDS, FRESH, [30, 31, 12, 33], [40, 41, 12, 43], [50, 51, 52, 53]]
    with faulty(num_workers, *rounds, **{fault: 0, "level": 12, "length": 1}) as envs:
        envs.reset()
        assert envs.obs["obs"][:, 1].tolist() == [10, 11, 22, 13]
        result = envs.step(ZEROS)
        assert failed(result) == [] and [episode.seed for episode in result.episodes] == [10, 11, 22, 13]
        assert envs.obs["obs"][:, 1].tolist() == [20, 21, 52, 23]
        assert result.terminated.all() and len(result.faults) == 3, "the first reset's fault comes with the first step"
        assert all(re.search(says, text) for text in result.faults)


def test_idle_environments_stay_idle() -> None:
    idle = [-1] * 4
    with faulty(2, [10, -1, 13, -1], [-1, -1, 21, -1], idle, kill_at=1, level=13, length=4) as envs:
        envs.reset()
        results = [envs.step(ZEROS) for _ in range(8)]
        assert [failed(result) for result in results[:3]] == [[2], [], []]
        assert (results[0].reward[3], results[0].terminated[3], results[0].truncated[3]) == (0, False, False)
        assert envs.obs["obs"].tolist() == [[0, 0]] * 4
        episodes = [(e.index, e.seed, e.length) for result in results for e in result.episodes]
        assert episodes == [(0, 10, 4), (2, 21, 4)]


def test_a_process_that_dies_beside_a_broken_environment() -> None:
    """Its other environment has taken the step by then: it fails too, unless its episode ended with the step."""
    for length, expected in ((9, [2, 3]), (1, [2])):
        options: dict[str, Any] = {"step_at": 1, "level": 12, "kill_level": 22, "length": length}
        with faulty(2, SEEDS, FRESH, [30, 31, 32, 33], **options) as envs:
            envs.reset()
            result = envs.step(ZEROS)
            assert failed(result) == expected and len(result.faults) == 2
            assert [episode.index for episode in result.episodes] == [n for n in range(4) if length == 1 and n != 2]
            assert envs.obs["obs"][2:].tolist() == [[0, 32], [0, 33 if length == 1 else 23]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_when_the_budget_is_spent(num_workers: int) -> None:
    envs = faulty(num_workers, SEEDS, step_at=1, level=12)
    envs.reset()
    for _ in range(3):
        assert failed(envs.step(ZEROS)) == [2]
    pids = envs.worker_pids
    says = r"(?s)environment 2 .*Traceback.*as told.*\(after 3 restarts, of which a run may have 3\)$"
    with pytest.raises(WorkerError, match=says):
        envs.step(ZEROS)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    with pytest.raises(WorkerError, match="closed"):
        envs.send(ZEROS)


@pytest.mark.parametrize("how", ["kill_at", "step_at"])
def test_making_anew_is_tried_again(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second instance of this environment raises, and the third has another observation."""
    monkeypatch.setenv("MOODY", str(tmp_path / "log"))
    levels, options = GivenLevels([5], [6], [7], [8]), {how: 1, "level": 5}
    kwargs: dict[str, Any] = {"levels": levels, "options": options, "faults": FaultBudget(3)}
    with VectorEnv("fixture_envs:fixture/Moody-v0", num_envs=1, num_workers=1, **kwargs) as envs:
        envs.reset()
        result = envs.step(ZEROS[:1])
        assert failed(result) == [0]
        first, raised, other = result.faults
        assert ("SIGKILL" if how == "kill_at" else "as told, in step") in first
        assert "KeyError: 'moody'" in raised and "different" in other
        assert envs.obs["obs"].tolist() == [[0, 6 if how == "kill_at" else 8]]
