"""Episode replays: environments go on as if they had never stopped, and what cannot is told."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fixture_envs import GivenLevels, ended, play

from ppo_tbptt.envs import FaultBudget, LevelSeeds, LevelSource, VectorEnv, make_env
from ppo_tbptt.envs.workers.replay import EpisodeRecorder, EpisodeReplay, pack, unpack

FAULTY, TRACER = "fixture_envs:fixture/Faulty-v0", "fixture_envs:fixture/Tracer-v0"
POC = "ppo_tbptt/PocMemory-v0"
N = 5
FRESH = [50, 51, 52, 53, 54]
State = dict[str, np.ndarray]


def vector(env_id: str, levels: LevelSource, num_workers: int = 0, **kwargs: Any) -> VectorEnv:
    return VectorEnv(env_id, num_envs=N, levels=levels, num_workers=num_workers, replay=True, **kwargs)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


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
def test_nobody_can_tell_the_interruption_nor_workers_nor_groups(
    env_id: str, kwargs: dict[str, Any], steps: int, workers: int, then: int
) -> None:
    levels = LevelSeeds(3, N, 0, 1000)
    with vector(env_id, levels, workers, **kwargs) as envs:
        assert len(envs.worker_pids) == workers and envs.reset() is envs.obs
        rng = np.random.default_rng(5)
        play(envs, rng, steps)
        state, counts, numbers = envs.state_dict(), levels.state_dict(), rng.bit_generator.state
        expected = play(envs, rng, steps)
        after = envs.state_dict()
    assert ended(expected) and state["steps"].any()
    levels.load_state_dict(counts)
    with vector(env_id, levels, then, two_groups=workers != 1, **kwargs) as envs:
        assert len(envs.worker_pids) == sum(min(then, rows.stop - rows.start) for rows in envs.groups)
        seen: list[tuple[int, int]] = []
        assert envs.load_state_dict(state, lambda done, total: seen.append((done, total))).all()
        assert seen == [(done, N) for done in range(1, N + 1)]
        assert same(envs.state_dict(), state) and levels.state_dict() == counts
        rng.bit_generator.state = numbers
        assert play(envs, rng, steps) == expected
        assert same(envs.state_dict(), after)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_a_state_holds(num_workers: int) -> None:
    levels = GivenLevels([4, 5, -1, 6, 7], list(range(N)))
    with vector(POC, levels, num_workers) as envs:
        envs.reset()
        taken = [(np.arange(N)[:, None] + step) % 2 for step in range(3)]
        for action in taken:
            envs.step(action)
        state = envs.state_dict()
        assert state["seed"].tolist() == [4, 5, -1, 6, 7]
        assert state["steps"].tolist() == [3, 3, 0, 3, 3]
        assert state["actions"].dtype == np.uint8
        assert state["actions"].tolist() == [action[n].tolist() for n in (0, 1, 3, 4) for action in taken]
        kept = {key: array.copy() for key, array in state.items()}
        envs.step(taken[0])
        assert same(state, kept), "the caller's to keep"
        envs.reset()
        assert envs.state_dict()["seed"].tolist() == list(range(N)) and not envs.state_dict()["steps"].any()
        assert envs.load_state_dict(state).all()
        assert envs.obs["obs"][2].tolist() == [0, 0, 0]
        assert not envs.step(taken[0]).episodes
        assert envs.state_dict()["seed"][2] == -1
    with VectorEnv(POC, num_envs=1, levels=levels) as envs:
        envs.reset()
        assert envs.state_dict() == {}, "not asked for"


@pytest.mark.parametrize(("choices", "dtype"), [(256, "uint8"), (257, "uint16"), (65_537, "int64")])
def test_actions_take_few_bytes(choices: int, dtype: str) -> None:
    spec = replace(make_env(TRACER).spec, action_nvec=(2, choices))
    recorder = EpisodeRecorder(spec)
    recorder.begin(3, {})
    for action in ([0, choices - 1], [1, 5]):
        recorder.add(np.array(action), {}, 0.5)
    (replay,) = unpack(pack([recorder.replay]), spec, 1)
    assert (replay.seed, replay.digest, replay.actions.dtype) == (3, recorder.replay.digest, dtype)
    assert replay.actions.tolist() == [[0, choices - 1], [1, 5]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_cannot_be_repeated_is_told(num_workers: int) -> None:
    """The Tracer counts the episodes of its instance: all but a first episode look different in a new process."""
    with vector(TRACER, GivenLevels([2, 3, 4, 5, 6], [20] * N), num_workers) as envs:
        envs.reset()  # episodes of 5, 6, 7, 8 and 9 steps
        for _ in range(6):
            envs.step(np.zeros((N, 2), np.int64))
        state = envs.state_dict()
    assert (state["seed"].tolist(), state["steps"].tolist()) == ([20, 20, 4, 5, 6], [1, 0, 6, 6, 6])
    levels = GivenLevels(FRESH)
    with vector(TRACER, levels, num_workers) as envs:
        exact = envs.load_state_dict(state)
        assert exact.tolist() == [False, False, True, True, True] and levels.begun == [1, 1, 0, 0, 0]
        assert envs.obs["obs"][:, [0, 2]].tolist() == [[50, 0], [51, 0], [4, 6], [5, 6], [6, 6]]
        assert envs.state_dict()["seed"].tolist() == [50, 51, 4, 5, 6]


def after_three_steps() -> State:
    """Of environments that did not fail."""
    with vector(FAULTY, GivenLevels(list(range(N)))) as envs:
        envs.reset()
        for _ in range(3):
            envs.step(np.zeros((N, 1), np.int64))
        return envs.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("options", [{"step_at": 2}, {"length": 1}])
def test_a_replay_that_ends_early_or_raises(num_workers: int, options: dict[str, int]) -> None:
    with vector(FAULTY, GivenLevels(FRESH), num_workers, options=options) as envs:
        assert not envs.load_state_dict(after_three_steps()).any()
        assert envs.obs["obs"].tolist() == [[0, seed] for seed in FRESH]
        assert envs.state_dict()["seed"].tolist() == FRESH


@pytest.mark.parametrize("how", ["kill_at", "hang_at"])
def test_a_worker_that_does_not_survive_a_replay(how: str) -> None:
    budget, seen = FaultBudget(1), list[int]()
    kwargs: dict[str, Any] = {"options": {how: 2, "level": 1}, "faults": budget, "step_timeout": 2}
    with vector(FAULTY, GivenLevels(FRESH), 2, **kwargs) as envs:
        exact = envs.load_state_dict(after_three_steps(), lambda done, total: seen.append(done))
        assert exact.tolist() == [False, False, True, True, True] and len(seen) in (3, 4)
        assert envs.obs["obs"].tolist() == [[0, 50], [0, 51], [3, 2], [3, 3], [3, 4]]
        result = envs.step(np.zeros((N, 1), np.int64))
        assert budget.count == 1 and result.failed is None and len(result.faults) == 1


def test_long_replays_are_no_hangs() -> None:
    """Replays may take longer than a step may: the worker gives signs of life."""
    replays = [EpisodeReplay(n, np.zeros((3 if n < 4 else 0, 1), np.uint8), 0) for n in range(N)]
    with vector(FAULTY, GivenLevels(FRESH), 1, options={"seconds": 0.25}, step_timeout=2) as envs:
        assert not envs.load_state_dict(pack(replays)).any()  # after three seconds in all
        assert envs.obs["obs"].tolist() == [[0, seed] for seed in FRESH]


def test_states_are_checked() -> None:
    with vector(POC, GivenLevels(list(range(N)))) as envs:
        envs.reset()
        state = envs.state_dict()
        with pytest.raises(ValueError, match="4 environments, not 5"):
            envs.load_state_dict({**state, "steps": state["steps"][1:]})
        for wrong in (np.zeros((3, 2), np.uint8), np.zeros(3, np.uint8), np.zeros((3, 1))):
            with pytest.raises(ValueError, match=r"actions must be integers of shape \(steps, 1\)"):
                envs.load_state_dict({**state, "actions": wrong})
        assert envs.load_state_dict(state).all()
