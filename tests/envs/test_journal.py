"""Journals: an environment that is brought back goes on as if it had never stopped, and what cannot be is told."""

import json
import os
import signal
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ppo_tbptt.envs import Episode, EpisodeJournal, LevelSeeds, Restarts, VectorEnv, make_env

TRACER = "fixture_envs:fixture/Tracer-v0"
POC = "ppo_tbptt/PocMemory-v0"
N = 5


def vector(env_id: str, num_workers: int = 0, **kwargs: Any) -> VectorEnv:
    return VectorEnv(env_id, num_envs=N, num_workers=num_workers, journal=True, **kwargs)


def begin(envs: VectorEnv) -> LevelSeeds:
    seeds = LevelSeeds(3, N, 0, 1000)
    envs.reset(seeds.current)
    seeds.advance(np.ones(N, bool))
    return seeds


def play(envs: VectorEnv, seeds: LevelSeeds, rng: np.random.Generator, steps: int) -> list[Any]:
    """Random actions, often repeated; everything that the vector gives out, as bytes and plain values."""
    stream: list[Any] = []
    nvec = envs.spec.action_nvec
    action = np.zeros((N, len(nvec)), np.int64)
    for step in range(steps):
        if step % 3 == 0:
            action = rng.integers(0, nvec, (N, len(nvec)))
        result = envs.step(action, seeds.current)
        end = result.terminated | result.truncated
        seeds.advance(end)
        stream += [array.tobytes() for array in (result.reward, result.terminated, result.truncated)]
        stream += [array.tobytes() for array in envs.obs.values()]
        stream += [array[end].tobytes() for array in envs.final_obs.values()]
        stream.append(result.episodes)
    return stream


def episodes(stream: list[Any]) -> list[Episode]:
    return [episode for entry in stream if isinstance(entry, list) for episode in entry]


@pytest.mark.parametrize(
    ("env_id", "kwargs", "steps", "workers", "then"),
    [
        (POC, {}, 16, 0, 0),
        (POC, {}, 16, 2, 3),
        ("fixture_envs:fixture/ImageToy-v0", {"options": {"delay": 5}}, 17, 1, 0),
        ("fixture_envs:fixture/DictToy-v0", {"options": {"delay": 5}}, 18, 0, 2),
        ("ppo_tbptt/Truncate-v0", {"max_episode_steps": 7}, 18, 0, 1),
        ("MortarMayhem-Grid-v0", {"max_episode_steps": 50}, 70, 0, 2),
        ("MortarMayhemB-Grid-v0", {"options": {"command_count": [3]}}, 50, 2, 0),
        ("Endless-MortarMayhem-v0", {"options": {"max_steps": 60}}, 90, 1, 2),
        ("SearingSpotlights-v0", {"options": {"max_steps": 60}}, 90, 2, 1),
        ("Endless-SearingSpotlights-v0", {"options": {"steps_per_coin": 60}}, 90, 0, 0),
        ("MysteryPath-v0", {"options": {"max_steps": 60}}, 90, 0, 3),
        ("Endless-MysteryPath-v0", {"max_episode_steps": 60}, 90, 2, 2),
    ],
)
def test_nobody_can_tell_the_interruption(
    env_id: str, kwargs: dict[str, Any], steps: int, workers: int, then: int
) -> None:
    with vector(env_id, workers, **kwargs) as envs:
        seeds, rng = begin(envs), np.random.default_rng(5)
        play(envs, seeds, rng, steps)
        journals, counts, state = envs.journal(), seeds.state(), rng.bit_generator.state
        obs = {key: array.copy() for key, array in envs.obs.items()}
        expected = play(envs, seeds, rng, steps)
        after = envs.journal()
    assert episodes(expected) and any(len(journal.actions) for journal in journals)
    with vector(env_id, then, **kwargs) as envs:
        seen: list[tuple[int, int]] = []
        exact = envs.restore(journals, np.full(N, 7), lambda done, total: seen.append((done, total)))
        assert exact.all() and seen == [(done, N) for done in range(1, N + 1)]
        assert all(np.array_equal(envs.obs[key], obs[key]) for key in obs)
        assert [journal.to_json() for journal in envs.journal()] == [journal.to_json() for journal in journals]
        seeds.load_state(counts)
        rng.bit_generator.state = state
        assert play(envs, seeds, rng, steps) == expected
        assert [journal.to_json() for journal in envs.journal()] == [journal.to_json() for journal in after]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_journal_holds(num_workers: int) -> None:
    with vector(POC, num_workers) as envs:
        envs.reset(np.array([4, 5, -1, 6, 7]))
        taken = [(np.arange(N)[:, None] + step) % 2 for step in range(3)]
        for action in taken:
            envs.step(action, np.arange(N))
        journals = envs.journal()
        assert [journal.seed for journal in journals] == [4, 5, -1, 6, 7]
        assert [journal.idle for journal in journals] == [False, False, True, False, False]
        for n, journal in enumerate(journals):
            assert journal.actions.dtype == np.uint8
            assert journal.actions.tolist() == ([] if n == 2 else [action[n].tolist() for action in taken])
        kept = journals[0].to_json()
        envs.step(taken[0], np.arange(N))
        assert journals[0].to_json() == kept, "the caller's to keep"
        envs.reset(np.arange(N))
        assert all(len(journal.actions) == 0 and journal.seed == n for n, journal in enumerate(envs.journal()))
        envs.restore(journals, np.zeros(N, int))
        assert envs.obs["obs"][2].tolist() == [0, 0, 0]
        assert [episode.index for episode in envs.step(taken[0], np.arange(N)).episodes] == []
        assert envs.journal()[2].idle


def test_actions_beyond_a_byte() -> None:
    actions = np.array([[0, 65_536], [1, 256], [0, 255]])
    for choices, dtype in ((256, "uint8"), (257, "uint16"), (65_537, "int64")):
        spec = replace(make_env(TRACER).spec, action_nvec=(2, choices))
        journal = EpisodeJournal(3, actions.clip(max=choices - 1).astype(dtype), 2**64 - 1)
        again = EpisodeJournal.from_json(json.loads(json.dumps(journal.to_json())), spec)
        assert (again.seed, again.hash, again.actions.dtype) == (3, 2**64 - 1, dtype)
        assert np.array_equal(again.actions, journal.actions)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_repeated_is_told(num_workers: int) -> None:
    """The Tracer counts the episodes of its instance: all but a first episode look different in a new process."""
    with vector(TRACER, num_workers) as envs:
        envs.reset(np.array([2, 3, 4, 5, 6]))  # of 5, 6, 7, 8 and 9 steps
        for _ in range(6):
            envs.step(np.zeros((N, 2), np.int64), np.full(N, 20))
        journals = envs.journal()
    assert [(journal.seed, len(journal.actions)) for journal in journals] == [(20, 1), (20, 0), (4, 6), (5, 6), (6, 6)]
    with vector(TRACER, num_workers) as envs:
        exact = envs.restore(journals, np.array([30, 31, 32, 33, 34]))
        assert exact.tolist() == [False, False, True, True, True]
        assert envs.obs["obs"][:, [0, 2]].tolist() == [[30, 0], [31, 0], [4, 6], [5, 6], [6, 6]]
        assert [journal.seed for journal in envs.journal()] == [30, 31, 4, 5, 6]


def after_three_steps() -> list[EpisodeJournal]:
    """Of environments that did not fail."""
    with vector("fixture_envs:fixture/Faulty-v0") as envs:
        envs.reset(np.arange(N))
        for _ in range(3):
            envs.step(np.zeros((N, 1), np.int64), np.arange(N))
        return envs.journal()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("change", [{"max_episode_steps": 2}, {"options": {"step_at": 2}}, {"options": {"length": 1}}])
def test_a_replay_that_ends_early_or_raises(num_workers: int, change: dict[str, Any]) -> None:
    journals, fallback = after_three_steps(), np.arange(50, 50 + N)
    with vector("fixture_envs:fixture/Faulty-v0", num_workers, **change) as envs:
        assert not envs.restore(journals, fallback).any()
        assert envs.obs["obs"].tolist() == [[0, seed] for seed in fallback]
        assert [journal.seed for journal in envs.journal()] == fallback.tolist()


@pytest.mark.parametrize("how", ["kill_at", "hang_at"])
def test_a_worker_that_does_not_survive_a_replay(how: str) -> None:
    journals, fallback = after_three_steps(), np.arange(50, 50 + N)
    seen = []
    options = {how: 2, "level": 1}
    with vector("fixture_envs:fixture/Faulty-v0", 2, options=options, restarts=Restarts(1), step_timeout=1) as envs:
        exact = envs.restore(journals, fallback, lambda done, total: seen.append(done))
        assert exact.tolist() == [False, False, True, True, True] and len(seen) in (3, 4)
        assert envs.obs["obs"][:, 0].tolist() == [0, 0, 3, 3, 3]
        assert envs.restarts.count == 1 and envs.step(np.zeros((N, 1), np.int64), fallback).lost is None


def test_long_replays_are_no_hangs() -> None:
    """Replays may take longer than a step may: the worker gives signs of life."""
    with vector("fixture_envs:fixture/Faulty-v0", 1, options={"seconds": 0.25}, step_timeout=2) as envs:
        journals = [EpisodeJournal(n, np.zeros((3 if n < 4 else 0, 1), np.uint8), 0) for n in range(N)]
        assert not envs.restore(journals, np.arange(N)).any()  # after three seconds in all
        assert envs.obs["obs"].tolist() == [[0, n] for n in range(N)]


def test_arguments_are_checked() -> None:
    with vector(POC) as envs:
        seeds = np.arange(N)
        envs.reset(seeds)
        journals = envs.journal()
        with pytest.raises(ValueError, match="4 journals for 5 environments"):
            envs.restore(journals[1:], seeds)
        with pytest.raises(ValueError, match="seeds must be integers"):
            envs.restore(journals, seeds[1:])
        for wrong in (np.zeros((3, 2), np.uint8), np.zeros(3, np.uint8), np.zeros((3, 1))):
            with pytest.raises(ValueError, match=r"actions must be integers of shape \(steps, 1\)"):
                envs.restore([EpisodeJournal(1, wrong, 0), *journals[1:]], seeds)
        assert envs.restore(journals, seeds).all()
    with VectorEnv(POC, num_envs=1, num_workers=0) as envs, pytest.raises(RuntimeError, match="no journal"):
        envs.journal()


def test_a_restart_begins_new_journals() -> None:
    zeros = np.zeros((N, 1), np.int64)
    with vector("fixture_envs:fixture/Faulty-v0", 2, restarts=Restarts(1)) as envs:
        envs.reset(np.arange(N))
        envs.step(zeros, np.arange(N))
        os.kill(envs.worker_pids[0], signal.SIGKILL)
        envs.step(zeros, np.arange(N))
        envs.restart(np.arange(60, 60 + N))
        assert [(j.seed, len(j.actions)) for j in envs.journal()] == [(60, 0), (61, 0), (2, 2), (3, 2), (4, 2)]
