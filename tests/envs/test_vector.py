"""VectorEnv: autoreset, final observations, idle environments, the same stream with any number of workers."""

import gc
from typing import Any

import numpy as np
import pytest
from fixture_envs import tracer_length, tracer_reward, tracer_terminates

from ppo_tbptt.envs import Episode, LevelSeeds, VectorEnv, WorkerError, make_env
from ppo_tbptt.envs.workers.pool import WorkerPool

TRACER = "fixture_envs:fixture/Tracer-v0"


def play(env_id: str, num_workers: int, steps: int, num_envs: int = 5, **kwargs: Any) -> list[Any]:
    """Everything that a vector gives out in `steps` steps of random actions."""
    stream: list[Any] = []
    with VectorEnv(env_id, num_envs=num_envs, num_workers=num_workers, **kwargs) as envs:
        assert envs.num_workers == num_workers == len(envs.worker_pids)
        seeds = LevelSeeds(0, num_envs, 1000, 50)
        envs.reset(seeds.current)
        seeds.advance(np.ones(num_envs, bool))
        stream.append({key: array.copy() for key, array in envs.obs.items()})
        rng = np.random.default_rng(1)
        for _ in range(steps):
            nvec = envs.spec.action_nvec
            result = envs.step(rng.integers(0, nvec, (num_envs, len(nvec))), seeds.current)
            over = result.terminated | result.truncated
            seeds.advance(over)
            stream.append({key: array.copy() for key, array in envs.obs.items()})
            stream.append({key: array[over].copy() for key, array in envs.final_obs.items()})
            stream += [{"r": result.reward, "t": result.terminated, "u": result.truncated}, result.episodes]
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
def test_workers_change_nothing(env_id: str, kwargs: dict[str, Any]) -> None:
    alone = play(env_id, 0, 40, **kwargs)
    assert sum(isinstance(entry, list) and len(entry) for entry in alone) >= 5
    for num_workers in (1, 3):
        assert same(play(env_id, num_workers, 40, **kwargs), alone)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_field_of_every_row(num_workers: int) -> None:
    """Against the Tracer's own arithmetic; the last observation of an episode and the first of the next included."""
    num_envs, rng = 4, np.random.default_rng(0)
    level, t = np.arange(num_envs), np.zeros(num_envs, int)
    number, ret = np.zeros(num_envs, int), np.zeros(num_envs)
    with VectorEnv(TRACER, num_envs=num_envs, num_workers=num_workers) as envs:
        envs.reset(level)
        assert envs.obs["obs"].dtype == np.float32
        kept = []
        for step in range(60):
            assert np.array_equal(envs.obs["obs"], np.stack([level, number, t], 1))
            action = rng.integers(0, (3, 2), (num_envs, 2))
            following = rng.integers(0, 100, num_envs)
            result = envs.step(action, following)
            kept.append((result, result.reward.copy()))
            expected = []
            for i in range(num_envs):
                reward = tracer_reward(int(t[i]), action[i])
                t[i], ret[i] = t[i] + 1, ret[i] + reward
                end, terminates = t[i] == tracer_length(level[i]), tracer_terminates(level[i])
                assert result.reward[i] == reward
                assert (result.terminated[i], result.truncated[i]) == (end and terminates, end and not terminates)
                if end:
                    assert envs.final_obs["obs"][i].tolist() == [level[i], number[i], t[i]]
                    length = int(t[i])
                    expected.append(
                        Episode(i, int(level[i]), float(ret[i]), length, terminates, {}, {"last_t": float(length)})
                    )
                    level[i], number[i], t[i], ret[i] = following[i], number[i] + 1, 0, 0
            assert result.episodes == expected, step
            assert result.reward.dtype == np.float32 and result.terminated.dtype == result.truncated.dtype == bool
        assert number.min() > 3
    assert all(np.array_equal(result.reward, reward) for result, reward in kept), "results are the caller's to keep"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_idle_environments(num_workers: int) -> None:
    with VectorEnv(TRACER, num_envs=3, num_workers=num_workers) as envs:
        assert (np.isnan(envs.obs["obs"])).all(), "what was never written cannot pass for data"
        envs.reset(np.array([0, -1, 2]))
        assert envs.obs["obs"].tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 0]]
        action = np.ones((3, 2), np.int64)
        lengths: dict[int, int] = {}
        result = envs.step(action, np.full(3, -1))
        for step in range(1, 12):
            result = envs.step(action, np.full(3, -1)) if step > 1 else result
            assert (result.reward[1], result.terminated[1], result.truncated[1]) == (0, False, False)
            lengths |= {episode.index: episode.length for episode in result.episodes}
            for i in (0, 2):
                done = step >= tracer_length(i)
                assert envs.obs["obs"][i].tolist() == ([0, 0, 0] if done else [i, 0, step])
                assert (result.reward[i] == 0) == (step > tracer_length(i))
        assert lengths == {0: tracer_length(0), 2: tracer_length(2)}
        assert not result.terminated.any() and not result.truncated.any() and not result.episodes
        envs.reset(np.array([-1, 5, -1]))
        assert envs.obs["obs"].tolist() == [[0, 0, 0], [5, 0, 0], [0, 0, 0]]


def test_images_start_poisoned() -> None:
    envs = VectorEnv("fixture_envs:fixture/ImageToy-v0", num_envs=1, num_workers=0)
    assert (envs.obs["obs"] == 0xAB).all() and envs.final_obs["obs"].shape == (1, 84, 84, 3)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_send_and_receive(num_workers: int) -> None:
    with VectorEnv(TRACER, num_envs=2, num_workers=num_workers) as envs:
        action, seeds = np.zeros((2, 2), np.int32), np.array([1, 2], np.uint8)
        with pytest.raises(RuntimeError, match="reset"):
            envs.send(action, seeds)
        envs.reset(seeds)
        with pytest.raises(RuntimeError, match="send"):
            envs.receive()
        envs.send(action, seeds)
        for illegal in (lambda: envs.send(action, seeds), lambda: envs.reset(seeds)):
            with pytest.raises(RuntimeError, match="under way"):
                illegal()
        assert envs.receive().reward.tolist() == [0, 0]
    envs.close()
    with pytest.raises(WorkerError, match="closed"):
        envs.reset(seeds)


def test_a_vector_of_one_is_a_single_environment() -> None:
    single, rng = make_env("SearingSpotlights-v0", max_episode_steps=30), np.random.default_rng(0)
    with VectorEnv("SearingSpotlights-v0", num_envs=1, num_workers=0, max_episode_steps=30) as envs:
        envs.reset(np.array([3]))
        assert np.array_equal(envs.obs["obs"][0], single.reset(3)["obs"])
        for _ in range(30):
            action = rng.integers(0, 3, (1, 2))
            result = envs.step(action, np.array([4]))
            obs, reward, terminated, truncated, _ = single.step(action[0])
            assert (result.reward[0], result.terminated[0], result.truncated[0]) == (reward, terminated, truncated)
            if terminated or truncated:
                assert np.array_equal(envs.final_obs["obs"][0], obs["obs"])
                obs = single.reset(4)
            assert np.array_equal(envs.obs["obs"][0], obs["obs"])


def test_a_forgotten_vector_ends_its_workers() -> None:
    envs = VectorEnv(TRACER, num_envs=2, num_workers=2)
    assert isinstance(envs._crew, WorkerPool)
    processes = envs._crew._processes
    assert all(process.poll() is None for process in processes)
    del envs
    gc.collect()
    assert all(process.returncode is not None for process in processes)
