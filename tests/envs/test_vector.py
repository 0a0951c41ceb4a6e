"""VectorEnv: autoreset, final observations, idle environments, the same stream with any number of workers."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels, tracer_length, tracer_reward, tracer_terminates

from ppo_tbptt.envs import EnvError, Episode, LevelSeeds, VectorEnv, WorkerError, make_env, resolve_workers
from ppo_tbptt.envs.workers import cores

TRACER = "fixture_envs:fixture/Tracer-v0"


def play(env_id: str, num_workers: int, steps: int, num_envs: int = 5, **kwargs: Any) -> list[Any]:
    """Everything that a vector gives out in `steps` steps of random actions, by row where groups may differ."""
    stream: list[Any] = []
    levels = LevelSeeds(0, num_envs, 1000, 50)
    with VectorEnv(env_id, num_envs=num_envs, num_workers=num_workers, levels=levels, **kwargs) as envs:
        assert len(envs.worker_pids) == num_workers * len(envs.groups)
        assert envs.reset() is envs.obs
        rng = np.random.default_rng(1)
        for _ in range(steps):
            stream.append({key: array.copy() for key, array in envs.obs.items()})
            nvec = envs.spec.action_nvec
            action = rng.integers(0, nvec, (num_envs, len(nvec)))
            for group, rows in enumerate(envs.groups):
                envs.send(action[rows], group)
            results = [envs.receive(group) for group in range(len(envs.groups))]
            for name in ("reward", "terminated", "truncated"):
                stream.append({name: np.concatenate([getattr(result, name) for result in results])})
            for key in envs.spec.obs:
                ends = [result.terminated | result.truncated for result in results]
                finals = [result.final_obs[key][end] for result, end in zip(results, ends, strict=True)]
                stream.append({key: np.concatenate(finals)})
            stream.append([episode for result in results for episode in result.episodes])
            assert all(result.failed is None and result.faults == () for result in results)
    return stream


def same(one: list[Any], other: list[Any]) -> bool:
    for a, b in zip(one, other, strict=True):
        if isinstance(a, dict):
            if a.keys() != b.keys() or not all(
                a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a
            ):
                return False
        elif a != b:
            return False
    return True


@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        (TRACER, {}),
        ("fixture_envs:fixture/DictToy-v0", {"options": {"delay": 1}}),
        ("MortarMayhemB-Grid-v0", {"max_episode_steps": 9}),
        ("SearingSpotlights-v0", {"options": {"max_steps": 25}, "max_episode_steps": 20}),
        ("Endless-MortarMayhem-v0", {"options": {"explosion_delay": [2], "allowed_commands": 4}}),
    ],
)
def test_workers_and_groups_change_nothing(env_id: str, kwargs: dict[str, Any]) -> None:
    alone = play(env_id, 0, 40, **kwargs)
    assert sum(isinstance(entry, list) and len(entry) for entry in alone) >= 5
    for num_workers, two_groups in ((1, False), (3, False), (0, True), (2, True)):
        assert same(play(env_id, num_workers, 40, two_groups=two_groups, **kwargs), alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_field_of_every_row(num_workers: int) -> None:
    """Against the Tracer's own arithmetic; the last observation of an episode and the first of the next included."""
    num_envs, rng = 4, np.random.default_rng(0)
    levels = GivenLevels(*rng.integers(0, 100, (30, num_envs)))
    t, number, ret = np.zeros(num_envs, int), np.zeros(num_envs, int), np.zeros(num_envs)
    level = np.array(levels.rounds[0])
    heard: list[tuple[int, Episode]] = []
    with VectorEnv(TRACER, num_envs=num_envs, num_workers=num_workers, levels=levels) as envs:
        envs.reset()
        assert envs.obs["obs"].dtype == np.float32
        kept = []
        for step in range(60):
            assert np.array_equal(envs.obs["obs"], np.stack([level, number, t], 1))
            action = rng.integers(0, (3, 2), (num_envs, 2))
            result = envs.step(action)
            kept.append((result, result.reward.copy()))
            expected = []
            for i in range(num_envs):
                reward = tracer_reward(int(t[i]), action[i])
                t[i], ret[i] = t[i] + 1, ret[i] + reward
                end, terminates = t[i] == tracer_length(level[i]), tracer_terminates(level[i])
                assert result.reward[i] == reward
                assert (result.terminated[i], result.truncated[i]) == (end and terminates, end and not terminates)
                if end:
                    assert result.final_obs["obs"][i].tolist() == [level[i], number[i], t[i]]
                    length = int(t[i])
                    expected.append(
                        Episode(i, int(level[i]), float(ret[i]), length, terminates, {}, {"last_t": float(length)})
                    )
                    number[i], t[i], ret[i] = number[i] + 1, 0, 0
                    level[i] = levels.rounds[number[i]][i]
            assert result.episodes == expected, step
            heard += [(episode.index, episode) for episode in expected]
            assert result.reward.dtype == np.float32 and result.terminated.dtype == result.truncated.dtype == bool
        assert number.min() > 3 and levels.heard == heard
    assert all(np.array_equal(result.reward, reward) for result, reward in kept), "results are the caller's to keep"


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


def test_images_start_poisoned() -> None:
    envs = VectorEnv("fixture_envs:fixture/ImageToy-v0", num_envs=1, levels=GivenLevels([1]))
    assert (envs.obs["obs"] == 0xAB).all()


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


def test_a_vector_of_one_is_a_single_environment() -> None:
    single, rng = make_env("SearingSpotlights-v0", max_episode_steps=30), np.random.default_rng(0)
    levels = GivenLevels([3], [4])
    with VectorEnv("SearingSpotlights-v0", num_envs=1, levels=levels, max_episode_steps=30) as envs:
        envs.reset()
        assert np.array_equal(envs.obs["obs"][0], single.reset(3)["obs"])
        for _ in range(30):
            action = rng.integers(0, 3, (1, 2))
            result = envs.step(action)
            obs, reward, terminated, truncated, _ = single.step(action[0])
            assert (result.reward[0], result.terminated[0], result.truncated[0]) == (reward, terminated, truncated)
            if terminated or truncated:
                assert np.array_equal(result.final_obs["obs"][0], obs["obs"])
                obs = single.reset(4)
            assert np.array_equal(envs.obs["obs"][0], obs["obs"])


def test_a_forgotten_vector_ends_its_workers() -> None:
    envs = VectorEnv(TRACER, num_envs=2, num_workers=2, levels=GivenLevels([1, 2]))
    pids = envs.worker_pids
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    del envs
    gc.collect()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


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
        ("MortarMayhem-Gird-v0", {}, "Did you mean 'MortarMayhem-Grid-v0'"),
        ("MortarMayhem-v0", {"options": {"arena_size": 9}}, "arena_size = 9"),
        (TRACER, {"options": {"max_lenght": 9}}, "max_length"),
        (TRACER, {"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        (TRACER, {"options": {"max_length": {1, 2}}}, "reset options must be"),
        (TRACER, {"num_envs": 0}, "num_envs must be at least 1"),
    ],
)
def test_the_users_mistakes_are_one_line(num_workers: int, env_id: str, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvError, match=says) as caught:
        VectorEnv(env_id, **{"num_envs": 2, "levels": GivenLevels([1, 2]), "num_workers": num_workers, **kwargs})
    assert "\n" not in str(caught.value)


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_workers(3, 8) == 3 and resolve_workers(8, 3) == 3 and resolve_workers(0, 3) == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", Path("/nowhere"))
    assert resolve_workers("auto", 4) == 4 and resolve_workers("auto", 99) == 6
    with pytest.raises(EnvError, match="num_workers"):
        resolve_workers(-1, 4)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu.max": "nonsense"}, 6),
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
    assert resolve_workers("auto", 99) == expected
