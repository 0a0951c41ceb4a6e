"""Toy environments: what their docstrings promise."""

import itertools

import numpy as np
import pytest

from ppo_tbptt.envs import Episode, SingleEnv, make_env


def act(*choices: int) -> np.ndarray:
    return np.array(choices, np.int64)


@pytest.mark.parametrize("knows", [True, False])
def test_poc_memory(knows: bool) -> None:
    """With memory 1.0 and the return of the docstring; with the best memoryless policy, and any level, one half."""
    env = make_env("ppo_tbptt/PocMemory-v0")
    assert (env.spec.headline, env.spec.headline_max) == ("success", 1.0)
    episodes: list[Episode] = []
    for seed in range(200):
        obs = env.reset(seed)["obs"]
        right = int(obs[2] == 1)
        assert obs.tolist() == [1 - 2 * right, 0, 2 * right - 1]
        for t in itertools.count(1):
            obs, _, _, _, episode = env.step(act(right if knows else 1))
            obs = obs["obs"]
            assert t >= 2 or obs[1] == 0
            assert (obs[0], obs[2]) == ((0, 0) if t >= 2 else (1 - 2 * right, 2 * right - 1))
            if episode:
                episodes.append(episode)
                break
    successes = sum(episode.measures["success"] for episode in episodes)
    assert successes == 200 if knows else 80 < successes < 120
    for episode in episodes:
        assert episode.length == 7 and episode.terminated
        assert episode.ret == pytest.approx((1 if episode.measures["success"] else -1) - 0.6)


def test_poc_memory_truncates_the_undecided() -> None:
    env = make_env("ppo_tbptt/PocMemory-v0", options={"num_show_steps": 3, "step_size": 0.5})
    env.reset(0)
    results = [env.step(act(t % 2)) for t in range(11)]
    assert [result[3] for result in results] == [False] * 10 + [True]
    assert results[-1][4] is not None and results[-1][4].measures == {"success": 0.0}


@pytest.mark.parametrize(("options", "length"), [({}, 8), ({"delay": 3}, 4), ({"delay": 0}, 1)])
def test_delayed_choice(options: dict[str, float], length: int) -> None:
    """Who remembers the cue is always right, whatever is done while waiting; a fixed action every fourth time."""
    env = make_env("ppo_tbptt/DelayedChoice-v0", options=options)
    assert (env.spec.headline, env.spec.headline_max, env.spec.action_nvec) == ("success", 1.0, (4,))
    fixed: list[float] = []
    for seed, knows in itertools.product(range(200), (True, False)):
        obs = env.reset(seed)["obs"]
        cue = int(obs[1:].argmax())
        assert sorted(obs[1:]) == [0, 0, 0, 1]
        for t in range(length):
            due = t == length - 1
            assert obs[0] == due and (t == 0 or not np.isin(obs[1:], (0, 1)).any())
            obs, reward, terminated, truncated, episode = env.step(act(cue if due and knows else 2))
            obs, success = obs["obs"], knows or cue == 2
            assert (terminated, truncated, reward) == (due, False, due and success)
            assert (episode and episode.measures) == ({"success": success} if due else None)
        if not knows:
            fixed.append(cue == 2)
    assert 0.13 < np.mean(fixed) < 0.37  # 4 standard errors


def test_noise_of_delayed_choice_comes_from_the_level() -> None:
    """It is as strong as told, and the same whenever the level is played again."""
    env = make_env("ppo_tbptt/DelayedChoice-v0", options={"delay": 500, "noise": 3.0})

    def noise(seed: int) -> np.ndarray:
        env.reset(seed)
        return np.stack([env.step(act(0))[0]["obs"][1:] for _ in range(500)])

    assert abs(noise(1).std() - 3.0) < 0.3
    assert np.array_equal(noise(1), noise(1)) and not np.array_equal(noise(1), noise(2))


def only_step(env: SingleEnv, seed: int, action: int) -> tuple[float, float]:
    obs = env.reset(seed)["obs"]
    _, reward, terminated, _, episode = env.step(act(action))
    assert terminated and episode is not None
    return float(obs[0]), reward


def test_probes() -> None:
    for action, seed in itertools.product((0, 1), range(8)):
        assert only_step(make_env("ppo_tbptt/ProbeConstant-v0"), seed, action) == (0.0, 1.0)
        assert only_step(make_env("ppo_tbptt/ProbeAction-v0"), seed, action) == (0.0, 2 * action - 1)
        obs, reward = only_step(make_env("ppo_tbptt/ProbeObservation-v0"), seed, action)
        assert abs(obs) == 1 and reward == obs
        obs, reward = only_step(make_env("ppo_tbptt/ProbeActionObservation-v0"), seed, action)
        assert reward == (1 if (obs == 1) == (action == 1) else -1)
    signs = {only_step(make_env("ppo_tbptt/ProbeObservation-v0"), seed, 0)[0] for seed in range(8)}
    assert signs == {-1.0, 1.0}
    env = make_env("ppo_tbptt/ProbeDiscount-v0")
    assert env.reset(0)["obs"].tolist() == [0.0]
    obs, reward, terminated, _, _ = env.step(act(0))
    assert (obs["obs"].tolist(), reward, terminated) == ([1.0], 0.0, False)
    _, reward, terminated, _, _ = env.step(act(0))
    assert (reward, terminated) == (1.0, True)


def test_truncate() -> None:
    env = make_env("ppo_tbptt/Truncate-v0", options={"length": 3})
    env.reset(0)
    assert [env.step(act(0))[1:4] for _ in range(3)] == [(1.0, False, False)] * 2 + [(1.0, False, True)]
