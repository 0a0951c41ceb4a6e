"""What VectorEnv says of wrong actions, seeds, ids, options and numbers of workers."""

from typing import Any

import numpy as np
import pytest

from ppo_tbptt.envs import EnvError, VectorEnv, resolve_workers

TRACER = "fixture_envs:fixture/Tracer-v0"


def test_arguments_are_checked() -> None:
    with VectorEnv(TRACER, num_envs=2, num_workers=0) as envs:
        seeds, action = np.array([1, 2]), np.zeros((2, 2), np.int64)
        envs.reset(seeds)
        for wrong, says in [
            (action[:1], "shape"),
            (action.astype(float), "integers of shape"),
            (np.array([[0, 0], [0, 2]]), r"action \[0, 2\] of environment 1 is not below \(3, 2\)"),
            (np.array([[-1, 0], [0, 0]]), "environment 0"),
        ]:
            with pytest.raises(ValueError, match=says):
                envs.step(wrong, seeds)
        for wrong in (seeds[:1], seeds.astype(float)):
            with pytest.raises(ValueError, match="seeds must be integers"):
                envs.step(action, wrong)
            with pytest.raises(ValueError, match="seeds must be integers"):
                envs.reset(wrong)
        assert envs.step(action, seeds).reward.tolist() == [0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("env_id", "kwargs", "says"),
    [
        ("MortarMayhem-Gird-v0", {}, "Did you mean 'MortarMayhem-Grid-v0'"),
        ("MortarMayhem-v0", {"options": {"arena_size": 9}}, "arena_size = 9"),
        (TRACER, {"options": {"max_lenght": 9}}, "max_length"),
        (TRACER, {"max_episode_steps": 0}, "max_episode_steps must be at least 1"),
        (TRACER, {"options": {"max_length": {1, 2}}}, "reset options must be"),
    ],
)
def test_the_users_mistakes_are_one_line(num_workers: int, env_id: str, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvError, match=says) as caught:
        VectorEnv(env_id, num_envs=2, num_workers=num_workers, **kwargs)
    assert "\n" not in str(caught.value)


def test_resolve_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_workers(3, 8) == 3 and resolve_workers(8, 3) == 3 and resolve_workers(0, 3) == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert resolve_workers("auto", 4) == 4 and resolve_workers("auto", 99) == 6
    with pytest.raises(EnvError, match="num_workers"):
        resolve_workers(-1, 4)
    with pytest.raises(EnvError, match="num_envs"):
        VectorEnv(TRACER, num_envs=0, num_workers=0)
