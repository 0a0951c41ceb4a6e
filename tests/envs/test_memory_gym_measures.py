"""What is measured in MemoryGym, where the environment's own figures are right and where they are not."""

from typing import Any

import numpy as np
import pytest

from ppo_tbptt.envs import EnvError, Episode, SingleEnv, make_env

FINITE = ("MortarMayhem-v0", "MortarMayhem-Grid-v0", "MortarMayhemB-v0", "MortarMayhemB-Grid-v0")
QUICK: dict[str, Any] = {"command_count": [3], "reward_command_success": 0.7, "reward_command_failure": -0.4}


def toward(env: SingleEnv) -> np.ndarray:
    """The move that brings a Mortar Mayhem agent to its target tile."""
    bare: Any = env._bare
    dx, dy = (int(bare._target_pos[axis] - bare.normalized_agent_position[axis]) for axis in (0, 1))
    if not env.spec.discrete:
        return np.array([(0, 2, 1)[np.sign(dx)], (0, 2, 1)[np.sign(dy)]])
    if dx == dy == 0:
        return np.array([0])
    facing = 270 if dx > 0 else 90 if dx < 0 else 180 if dy > 0 else 0
    return np.array([3 if bare.agent.rotation == facing else 1 if (facing - bare.agent.rotation) % 360 == 90 else 2])


def play_mortar(env: SingleEnv, seed: int, fail_command: int | None) -> tuple[Episode, float]:
    """Obey every command, but stay away from the target of `fail_command`. The last reward comes along."""
    env.reset(seed)
    bare: Any = env._bare
    while True:
        action = toward(env)
        if bare._current_command == fail_command and not bare.arena.tiles_on:
            on_target = tuple(bare.normalized_agent_position) == tuple(bare._target_pos)
            if env.spec.discrete:  # leave, or turn and leave if that was a wall, and stay away
                action = np.array([3 if bare._command_steps % 2 else 1]) if on_target else np.array([0])
            else:
                action = np.array([2 if bare._target_pos[0] < 2 else 1, 0])
        _, reward, _, _, episode = env.step(action)
        if episode is not None:
            return episode, reward


@pytest.mark.parametrize("env_id", FINITE)
@pytest.mark.parametrize("fail_command", [None, 0, 1, 2])
def test_success_is_to_obey_every_command(env_id: str, fail_command: int | None) -> None:
    env = make_env(env_id, options=QUICK)
    for seed in range(4):
        episode, reward = play_mortar(env, seed, fail_command)
        if fail_command is None:
            assert episode.measures == episode.env == {"success": 1.0, "commands_completed": 1.0}
            assert episode.ret == pytest.approx(2.1) and episode.terminated
            continue
        assert reward < 0
        assert episode.measures["success"] == 0.0
        assert episode.measures["commands_completed"] == pytest.approx(fail_command / 3)
        assert episode.env["success"] == float(fail_command == 2), "the environment claims success after all"


def test_mortar_mayhem_cut_by_our_limit() -> None:
    env = make_env("MortarMayhemB-Grid-v0", options=QUICK, max_episode_steps=11)
    episode, _ = play_mortar(env, 0, None)
    assert episode.length == 11 and not episode.terminated and episode.env == {}
    assert episode.measures == {"success": 0.0, "commands_completed": pytest.approx(1 / 3)}


def random_episode(env: SingleEnv, seed: int) -> Episode:
    env.reset(seed)
    rng = np.random.default_rng(seed)
    while True:
        episode = env.step(rng.integers(0, env.spec.action_nvec))[4]
        if episode is not None:
            return episode


@pytest.mark.parametrize(
    ("env_id", "keys", "options"),
    [
        ("MysteryPath-v0", {"success", "num_fails"}, {"max_steps": 80}),
        ("MysteryPath-Grid-v0", {"success", "num_fails"}, {"max_steps": 80}),
        ("SearingSpotlights-v0", {"success", "coins_collected", "agent_health"}, {"num_coins": [4], "max_steps": 90}),
        ("Endless-MortarMayhem-v0", {"commands_completed", "max_command_sequence"}, {"explosion_delay": [3]}),
        ("Endless-MysteryPath-v0", {"tiles_visited", "max_x", "num_fails"}, {}),
        ("Endless-SearingSpotlights-v0", {"coins_collected", "agent_health"}, {"steps_per_coin": 90}),
    ],
)
def test_measures_are_the_environments_own_where_those_are_right(
    env_id: str, keys: set[str], options: dict[str, Any]
) -> None:
    env = make_env(env_id, options=options)
    episodes = [random_episode(env, seed) for seed in range(6)]
    for episode in episodes:
        assert episode.terminated and episode.measures == episode.env and set(episode.measures) == keys
    cut = random_episode(make_env(env_id, options=options, max_episode_steps=5), 0)
    assert cut.length == 5 and not cut.terminated and cut.env == {} and set(cut.measures) == keys
    assert cut.measures.get("success", 0.0) == 0.0


def test_progress_counts_when_cut_by_our_limit() -> None:
    options = {"explosion_delay": [6], "explosion_duration": [2], "command_show_duration": [1]}
    episode, _ = play_mortar(make_env("Endless-MortarMayhem-v0", options=options, max_episode_steps=40), 0, None)
    assert episode.measures["commands_completed"] == round(episode.ret / 0.1) > 1
    assert episode.measures["max_command_sequence"] >= 1


def test_own_limit_at_the_environments_last_step_is_no_truncation() -> None:
    length = random_episode(make_env("MortarMayhemB-Grid-v0"), 0).length
    assert random_episode(make_env("MortarMayhemB-Grid-v0", max_episode_steps=length), 0).terminated


@pytest.mark.parametrize("num_coins", [[0], []])
def test_searing_spotlights_without_coins(num_coins: list[int]) -> None:
    options = {"num_coins": num_coins, "max_steps": 20}
    episode = random_episode(make_env("SearingSpotlights-v0", options=options), 0)
    assert set(episode.measures) == {"success", "agent_health"} == set(episode.env)


@pytest.mark.parametrize("coin_scale", [0.375, 20.0])
def test_searing_spotlights_without_exit(coin_scale: float) -> None:
    options = {"use_exit": False, "max_steps": 60, "num_coins": [1], "coin_scale": coin_scale}
    env = make_env("SearingSpotlights-v0", options=options, render_mode="ground_truth")
    episodes = [random_episode(env, seed) for seed in range(8)]
    assert env.render() is not None
    assert (coin_scale > 1) in {episode.measures["success"] for episode in episodes}
    assert all(episode.measures["success"] == episode.measures["coins_collected"] for episode in episodes)


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("MortarMayhem-v0", {"command_cuont": [3]}, r"unknown reset option 'command_cuont'.*'command_count'.*arena_"),
        ("MortarMayhem-v0", {"arena_size": 9, "command_count": [3]}, r"options arena_size = 9 \(AssertionError"),
        ("MortarMayhemB-v0", {"command_count": [21]}, "20 commands"),
        ("Endless-SearingSpotlights-v0", {"show_last_action": False}, "show_last_action = False"),
    ],
)
def test_impossible_options(env_id: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvError, match=says) as caught:
        make_env(env_id, options=options)
    assert "\n" not in str(caught.value)
