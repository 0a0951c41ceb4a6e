"""Toy environments: what their docstrings promise."""

import itertools

import numpy as np
import pytest

from ppo_tbptt.envs import EnvError, Episode, SingleEnv, make_env


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


@pytest.mark.parametrize("items", [1, 4, 7])
def test_ordered_recall(items: int) -> None:
    """Who gives back what was shown is always right; the same symbol over and over every fourth time."""
    env = make_env("ppo_tbptt/OrderedRecall-v0", options={"items": items})
    assert (env.spec.headline, env.spec.headline_max, env.spec.action_nvec) == ("recalled", 1.0, (4,))
    fixed: list[float] = []
    for seed, knows in itertools.product(range(200), (True, False)):
        obs, shown, rights, episode = env.reset(seed)["obs"], [], [], None
        for t in range(2 * items):
            assert obs[0] == (t >= items)
            assert sorted(obs[1:]) == ([0, 0, 0, 1] if t < items else [0] * 4)  # no hint which one is due
            if t < items:
                shown.append(int(obs[1:].argmax()))
            action = shown[t - items] if knows and t >= items else 2
            obs, reward, terminated, truncated, episode = env.step(act(action))
            obs = obs["obs"]
            if t >= items:
                rights.append(knows or shown[t - items] == 2)
            assert reward == (t >= items and rights[-1])
            assert (terminated, truncated, episode is not None) == (t == 2 * items - 1, False, t == 2 * items - 1)
        assert episode is not None
        assert episode.measures == {"recalled": np.mean(rights), "success": float(all(rights))}
        if not knows:
            fixed += rights
    assert abs(np.mean(fixed) - 0.25) < 4 * (0.25 * 0.75 / len(fixed)) ** 0.5


@pytest.mark.parametrize("items", [1, 3, 16])
def test_unordered_recall(items: int) -> None:
    """Who remembers what was shown is always right; the same answer over and over for exactly half of the set."""
    env = make_env("ppo_tbptt/UnorderedRecall-v0", options={"items": items})
    assert (env.spec.headline, env.spec.headline_max, env.spec.action_nvec) == ("recalled", 1.0, (2,))
    firsts: set[tuple[int, ...]] = set()
    for seed, player in itertools.product(range(30), ("knows", "yes", "no", "the other way round")):
        obs, seen, episode = env.reset(seed)["obs"], [], None
        for t in range(3 * items):
            assert obs[0] == (t >= items) and sorted(obs[1:]) == [0] * 31 + [1]
            seen.append(int(obs[1:].argmax()))
            shown = seen[t] in seen[: min(t, items)]
            action = {"knows": shown, "yes": True, "no": False}.get(player, not shown)
            obs, reward, terminated, truncated, episode = env.step(act(action))
            obs = obs["obs"]
            assert reward == (t >= items and action == shown)
            assert (terminated, truncated, episode is not None) == (t == 3 * items - 1, False, t == 3 * items - 1)
        assert sorted(seen[items:]) == list(range(2 * items)) and len(set(seen[:items])) == items
        share = {"knows": 1, "yes": 0.5, "no": 0.5}.get(player, 0)
        assert episode is not None and episode.measures == {"recalled": share, "success": float(share == 1)}
        firsts.add((*seen[:items], *seen[items:]))
    assert len(firsts) == (4 if items == 1 else 30)  # orders are drawn, both of them


def test_a_recall_that_is_cut_short_counts_as_nothing() -> None:
    """The headline measure is there in any case: training and evaluation ask for it."""
    env = make_env("ppo_tbptt/OrderedRecall-v0", max_episode_steps=3)
    env.reset(0)
    *_, (_, _, terminated, truncated, episode) = (env.step(act(0)) for _ in range(3))
    assert (terminated, truncated) == (False, True)
    assert episode is not None and episode.measures == {"recalled": 0.0}


@pytest.mark.parametrize("task", ["OrderedRecall", "UnorderedRecall"])
def test_recall_of_no_items_or_too_many_is_refused(task: str) -> None:
    for items in (0, 65 if task == "OrderedRecall" else 17, 2.5, "four"):
        with pytest.raises(EnvError, match="items must be a"):
            make_env(f"ppo_tbptt/{task}-v0", options={"items": items})


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
