"""VectorEnv: autoreset, final observations, idle environments, checks, the number of workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels, tracer_length

from ppo_tbptt.envs import EnvError, VectorEnv, WorkerError, resolve_workers
from ppo_tbptt.envs.workers import cores

TRACER = "fixture_envs:fixture/Tracer-v0"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_idle_environments(num_workers: int) -> None:
    levels = GivenLevels([0, -1, 2], [-1, -1, -1], [-1, 5, -1])
    with VectorEnv(TRACER, num_envs=3, num_workers=num_workers, levels=levels) as envs:
        assert (np.isnan(envs.obs["obs"])).all(), "what was never written cannot pass for data"
        envs.reset()
        assert envs.obs["obs"].tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0]]
        action = np.ones((3, 2), np.int64)
        lengths: dict[int, int] = {}
        for step in range(1, 12):
            result = envs.step(action)
            assert (result.reward[1], result.terminated[1], result.truncated[1]) == (0, False, False)
            lengths |= {episode.index: episode.length for episode in result.episodes}
            for i in (0, 2):
                done = step >= tracer_length(i)
                assert envs.obs["obs"][i].tolist() == ([0, 0, 0] if done else [i, 0, step])
                assert (result.reward[i] == 0) == (step > tracer_length(i))
        assert lengths == {0: tracer_length(0), 2: tracer_length(2)}
        last = envs.step(action)
        assert not last.terminated.any() and not last.truncated.any() and not last.episodes
        levels.begun = [2, 2, 2]
        envs.reset()
        assert envs.obs["obs"].tolist() == [[0, 0, 0], [5, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_send_and_receive(num_workers: int) -> None:
    envs = VectorEnv(TRACER, num_envs=3, num_workers=num_workers, levels=GivenLevels([1, 2, 3]), two_groups=True)
    action = np.zeros((2, 2), np.int32)
    with envs:
        with pytest.raises(RuntimeError, match="reset"):
            envs.send(action)
        envs.reset()
        with pytest.raises(RuntimeError, match="send"):
            envs.receive()
        envs.send(action, 0)
        for illegal in (lambda: envs.send(action, 0), envs.reset, envs.state_dict):
            with pytest.raises(RuntimeError, match="under way"):
                illegal()
        envs.send(action[:1], 1)
        assert envs.receive(0).reward.tolist() == [0, 0] and envs.receive(1).reward.tolist() == [0]
    envs.close()
    with pytest.raises(WorkerError, match="closed"):
        envs.reset()


def test_actions_are_checked() -> None:
    with VectorEnv(TRACER, num_envs=2, levels=GivenLevels([1, 2])) as envs:
        action = np.zeros((2, 2), np.int64)
        envs.reset()
        for wrong, says in [
            (action[:1], "shape"),
            (action.astype(float), "integers of shape"),
            (np.array([[0, 0], [0, 2]]), r"action \[0, 2\] of environment 1 is not below \(3, 2\)"),
            (np.array([[-1, 0], [0, 0]]), "environment 0"),
        ]:
            with pytest.raises(ValueError, match=says):
                envs.step(wrong)
        assert envs.step(action).reward.tolist() == [0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("env_id", "kwargs", "says"),
    [
        (TRACER, {"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        (TRACER, {"options": {"max_length": {1, 2}}}, "reset options must be"),
        (TRACER, {"num_envs": 0}, "num_envs must be at least 1"),
        ("fixture_envs:fixture/Moody-v0", {}, r"its constructor raised KeyError: 'MOODY' \(.*, line"),
    ],
)
def test_the_users_mistakes_are_one_line(num_workers: int, env_id: str, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvError, match=says) as caught:
        VectorEnv(env_id, **{"num_envs": 2, "levels": GivenLevels([1, 2]), "num_workers": num_workers, **kwargs})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({}, 6),
    ],
)
def test_a_containers_cpu_quota_limits_the_workers(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resolve_workers("auto", 99) == expected and resolve_workers("auto", 2) == min(2, expected)
    assert resolve_workers(3, 8) == 3 and resolve_workers(8, 3) == 3 and resolve_workers(0, 3) == 0
    with pytest.raises(EnvError, match="num_workers"):
        resolve_workers(-1, 4)
