"""MemoryGym through make_env: the same numbers as a fresh bare environment, whatever was played before or beside it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pygame
import pytest

from ppo_tbptt.envs import MEMORY_GYM_IDS, ArraySpec, SingleEnv, make_env
from ppo_tbptt.envs.make import open_env

FRAME = ArraySpec(shape=(84, 84, 3), dtype="uint8")
GRID = {"MortarMayhem-Grid-v0", "MortarMayhemB-Grid-v0", "MysteryPath-Grid-v0", "Endless-MysteryPath-v0"}
SEARING = ("SearingSpotlights-v0", "Endless-SearingSpotlights-v0")
SHORT: dict[str, dict[str, Any]] = {
    "MortarMayhem-v0": {"command_count": [2]},
    "Endless-SearingSpotlights-v0": {"steps_per_coin": 60},
    "SearingSpotlights-v0": {"max_steps": 60},
    "MysteryPath-v0": {"max_steps": 60},
    "MysteryPath-Grid-v0": {"max_steps": 60},
}
VARIANTS = [(env_id, SHORT.get(env_id, {})) for env_id in MEMORY_GYM_IDS] + [
    (SEARING[0], {"max_steps": 40, "black_background": True, "num_coins": [3], "show_last_action": False}),
    (SEARING[0], {"max_steps": 40, "hide_chessboard": True, "agent_visible": True, "agent_health": 3}),
    (SEARING[1], {"steps_per_coin": 40, "hide_chessboard": True, "light_dim_off_duration": 0}),
    ("Endless-MysteryPath-v0", {"show_background": True, "show_stamina": True, "show_origin": True}),
    ("Endless-MortarMayhem-v0", {"max_steps": 30, "initial_command_count": 3, "command_show_delay": [0]}),
]
IDS = [f"{env_id}{'-variant' if place >= len(MEMORY_GYM_IDS) else ''}" for place, (env_id, _) in enumerate(VARIANTS)]


def as_dict(obs: Any) -> dict[str, np.ndarray]:
    return {key: x.copy() for key, x in (obs if isinstance(obs, dict) else {"obs": obs}).items()}


def equal(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return set(ours) == set(theirs) and all(
        ours[key].dtype == theirs[key].dtype and np.array_equal(ours[key], theirs[key]) for key in ours
    )


def actions(env: SingleEnv, seed: int, count: int = 2000) -> np.ndarray:
    nvec = env.spec.action_nvec
    # Often repeated: a random walk that changes direction at every step hardly leaves its tile.
    return np.random.default_rng(seed).integers(0, nvec, (count // 4, len(nvec))).repeat(4, axis=0)


@pytest.mark.parametrize("env_id", MEMORY_GYM_IDS)
def test_spec(env_id: str) -> None:
    env = make_env(env_id, max_episode_steps=70)
    task_b = "MayhemB" in env_id
    vector = ArraySpec(shape=(180,), dtype="float32")
    expected = {"vector_observation": vector, "visual_observation": FRAME} if task_b else {"obs": FRAME}
    assert env.spec.obs == expected and list(env.spec.obs) == list(expected)
    assert env.spec.action_nvec == ((4,) if env_id in GRID else (3, 3))
    assert env.spec.discrete == (env_id in GRID)
    assert env.spec.headline_max == (None if env_id.startswith("Endless") else 1.0)
    assert env.spec.max_episode_steps == 70 and env.spec.env_id == env_id


@contextmanager
def own_pygame() -> Iterator[None]:
    """MemoryGym as it comes, without the faster functions for its surfaces."""
    modules: list[Any] = [x for name, x in sys.modules.items() if name.startswith("memory_gym.")]
    modules = [module for module in modules if hasattr(module, "pygame")]
    fast = [module.pygame for module in modules]
    assert pygame not in fast
    for module in modules:
        module.pygame = pygame
    yield
    for module, own in zip(modules, fast, strict=True):
        module.pygame = own


@pytest.mark.parametrize(("env_id", "options"), VARIANTS, ids=IDS)
def test_reused_wrapper_equals_fresh_bare_environments(env_id: str, options: dict[str, Any]) -> None:
    """Several episodes in one wrapper, with one action buffer, beside another environment, each against a fresh one."""
    env = make_env(env_id, options=options, max_episode_steps=120)
    beside = make_env("SearingSpotlights-v0" if "Mortar" in env_id else "MortarMayhem-Grid-v0")
    beside.reset(0)
    buffer = np.zeros(len(env.spec.action_nvec), np.int64)
    for seed in (11, 12, 11, 13):
        with own_pygame():
            bare: Any = open_env(env_id, None)
            theirs, _ = bare.reset(seed=seed, options=dict(options))
        assert equal(env.reset(seed), as_dict(theirs))
        total, count, done, info, episode = 0.0, 0, False, {}, None
        for count, choice in enumerate(actions(env, seed), 1):
            with own_pygame():
                theirs, reward, done, _, info = bare.step(int(choice[0]) if env.spec.discrete else choice.copy())
            theirs = as_dict(theirs)
            beside.step(np.array([count % 4] if beside.spec.discrete else [count % 3, 1]))
            if count % 15 == 0:
                beside.reset(count)
            buffer[:] = choice
            ours, our_reward, terminated, truncated, episode = env.step(buffer)
            buffer[:] = 2
            assert equal(ours, theirs), (seed, count)
            assert (our_reward, terminated) == (reward, done)
            assert truncated == (count == 120 and not done)
            total += float(reward)
            if terminated or truncated:
                break
        assert episode is not None and (episode.index, episode.seed, episode.length) == (-1, seed, count)
        assert episode.ret == total and episode.terminated == done
        if done:
            assert episode.ret == pytest.approx(info["reward"]) and episode.length == info["length"]
            assert set(episode.env) == set(info) - {"reward", "length", "ground_truth"}
        assert env.spec.headline in episode.measures


@pytest.mark.parametrize(
    ("env_id", "variants"),
    [
        (SEARING[0], [{"hide_chessboard": True}, {}, {"black_background": True}, {"use_exit": False}, {}]),
        (SEARING[1], [{"black_background": True}, {}, {"hide_chessboard": True}, {"steps_per_coin": 20}]),
        ("MortarMayhem-Grid-v0", [{"command_count": [3]}, {"command_count": [1]}, {"arena_size": 4}, {}]),
        ("MysteryPath-Grid-v0", [{"show_origin": True, "show_goal": True}, {}, {"max_steps": 9}]),
    ],
)
def test_options_of_an_episode_leave_no_trace_in_the_next(env_id: str, variants: list[dict[str, Any]]) -> None:
    env = make_env(env_id)
    for seed, options in enumerate(variants):
        fresh = make_env(env_id, options=options)
        assert equal(env.reset(seed, options), fresh.reset(seed))
        for choice in actions(env, seed, 80):
            (obs, *ours), (expected, *theirs) = env.step(choice), fresh.step(choice)
            assert equal(obs, expected) and ours == theirs
            if ours[1]:
                break


def test_environments_outlive_each_other() -> None:
    env = make_env("MysteryPath-v0")
    make_env("SearingSpotlights-v0").close()
    obs = env.reset(4)
    env.close()
    assert equal(make_env("MysteryPath-v0").reset(4), obs)


def picture(env: SingleEnv) -> np.ndarray:
    frame = env.render()
    assert frame is not None
    return frame


def white(image: np.ndarray) -> np.ndarray:
    """Where commands are drawn: pure white around the centre (hands of the agent are not pure)."""
    return (image[28:56, 28:56] == 255).all(axis=-1)


@pytest.mark.parametrize("every", [1, 3], ids=["each step", "some steps"])
@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("env_id", ["MortarMayhem-v0", "MortarMayhem-Grid-v0", "Endless-MortarMayhem-v0"])
def test_ground_truth_shows_the_commands_of_the_observation(env_id: str, delay: int, every: int) -> None:
    options = {"command_show_delay": [delay], "explosion_delay": [2], "explosion_duration": [1], "allowed_commands": 5}
    env = make_env(env_id, options=options, render_mode="ground_truth")
    bare: Any = env._bare
    shown = 0
    for seed in range(12):
        obs, over, count = env.reset(seed), False, 0
        while not over and count < 60:
            if count % every == 0:
                frame = picture(env)
                assert frame.shape == (336, 336, 3) and frame.dtype == np.uint8
                small = frame[::4, ::4].transpose(1, 0, 2)
                mask, target = white(small), (small[28:56, 28:56] == (0, 255, 0)).all(axis=-1)  # drawn on top
                assert np.array_equal(mask, white(obs["obs"]) & ~target), (seed, count)
                assert np.array_equal(picture(env), frame)
                shown += mask.any()
            queue = bare._command_visualization
            obs, _, terminated, truncated, _ = env.step(np.zeros(len(env.spec.action_nvec), np.int64))
            over, count = terminated or truncated, count + 1
            assert queue is bare._command_visualization or env_id.startswith("Endless")
    assert shown > 10


@pytest.mark.parametrize("env_id", MEMORY_GYM_IDS)
def test_rendering_changes_no_observation(env_id: str) -> None:
    plain, rendered = make_env(env_id), make_env(env_id, render_mode="ground_truth")
    own = make_env(env_id, render_mode="rgb_array")
    for seed in (1, 2):
        obs = plain.reset(seed)
        (frame,) = (x for x in obs.values() if x.ndim == 3)
        assert equal(rendered.reset(seed), obs) and rendered.render() is not None
        assert equal(own.reset(seed), obs) and np.array_equal(picture(own), frame.transpose(1, 0, 2))
        for choice in actions(plain, seed, 48):
            obs, _, terminated, _, _ = plain.step(choice)
            assert equal(rendered.step(choice)[0], obs) and rendered.render() is not None
            if terminated:
                break
    assert plain.render() is None


def test_ground_truth_after_reset_shows_no_sprite_of_the_last_episode() -> None:
    env = make_env("Endless-MortarMayhem-v0", render_mode="ground_truth")
    env.reset(0)
    for _ in range(20):
        env.step(np.array([2, 2]))
    env.reset(5)
    fresh = make_env("Endless-MortarMayhem-v0", render_mode="ground_truth")
    fresh.reset(5)
    assert np.array_equal(picture(env), picture(fresh))
