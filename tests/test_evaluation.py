"""Held-out evaluation: exactly the asked episodes, the same numbers for any number of workers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from fixture_envs import tracer_length, tracer_terminates
from helpers import tiny_agent

from ppo_tbptt.cli import main
from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import WorkerError
from ppo_tbptt.evaluation.evaluate import PARALLEL_EPISODES, Evaluation, evaluate
from ppo_tbptt.evaluation.statistics import estimate
from ppo_tbptt.models import Agent
from ppo_tbptt.training.trainer import Trainer


def tracer_agent() -> Agent:
    agent = tiny_agent({"obs": (3,)}, (3, 2))
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 2.0)
    # Level seeds up to 129 would drown everything else: scale them down, so that the state decides actions.
    torch.nn.init.constant_(agent.encoder.get_parameter("parts.obs.layers.0.weight")[:, 0], 0.0)
    return agent


def play(**changes: object) -> Evaluation:
    arguments: dict[str, object] = {"seeds": range(100, 130), "repeats": 3, "num_workers": 0, **changes}
    return evaluate(tracer_agent(), EnvConfig(id="fixture_envs:fixture/Tracer-v0"), **arguments)  # type: ignore[arg-type]


def test_each_seed_is_played_exactly_so_often_whatever_its_length() -> None:
    """90 episodes of 3 to 9 steps in 64 environments: short ones are not counted more."""
    result = play()
    assert PARALLEL_EPISODES < 90
    played = Counter((row["seed"], row["repeat"]) for row in result.per_episode)
    assert played == Counter((seed, repeat) for seed in range(100, 130) for repeat in range(3))
    assert [row["length"] for row in result.per_episode] == [
        tracer_length(seed) for seed in range(100, 130) for _ in "123"
    ]
    expected = np.mean([tracer_length(seed) for seed in range(100, 130)])
    assert result.measures["length"].mean == pytest.approx(expected)


def test_defaults() -> None:
    """Three repeats, sampled; one level seed is enough here."""
    found = evaluate(tracer_agent(), EnvConfig(id="fixture_envs:fixture/Tracer-v0"), seeds=[100])
    settings = (found.repeats, found.greedy, found.sampling_seed, found.max_steps, found.forget_every, found.capped)
    assert settings == (3, False, 0, 16_384, None, 0)
    assert found == play(seeds=[100])


def test_the_number_of_workers_changes_nothing() -> None:
    results = [play(num_workers=n) for n in (0, 1, 3)]
    assert results[0] == results[1] == results[2]


def test_sampling_seed_and_repeats() -> None:
    first, again, other = play(), play(), play(sampling_seed=1)
    assert first == again
    assert first.per_episode != other.per_episode
    returns = [row["return"] for row in first.per_episode]
    assert any(returns[i] != returns[i + 1] for i in range(0, 90, 3))  # repeats draw other actions
    greedy = [row["return"] for row in play(greedy=True).per_episode]
    assert all(greedy[i] == greedy[i + 1] for i in range(0, 90, 3))


def test_an_episode_does_not_depend_on_those_beside_it() -> None:
    """Noise belongs to (sampling seed, level seed, repeat), so a subset of the levels gives the same episodes."""
    every = {(row["seed"], row["repeat"]): row for row in play().per_episode}
    for seed in (110, 128):  # of the first 64 episodes, and of those that follow in the same environments
        for row in play(seeds=range(seed, seed + 2)).per_episode:
            assert row["return"] == pytest.approx(every[row["seed"], row["repeat"]]["return"])


def test_long_episodes_are_cut_and_counted() -> None:
    result = play(max_steps=6)
    lengths = [tracer_length(seed) for seed in range(100, 130) for _ in "123"]
    assert [row["length"] for row in result.per_episode] == [min(length, 6) for length in lengths]
    # An episode that the task itself truncates at that very step can't be told from a cut one.
    cut = [
        tracer_length(seed) > 6 or (tracer_length(seed) == 6 and not tracer_terminates(seed))
        for seed in range(100, 130)
        for _ in "123"
    ]
    assert result.capped == sum(cut)
    assert [bool(row["capped"]) for row in result.per_episode] == cut


def test_progress_is_told_after_every_step() -> None:
    told: list[int] = []
    play(seeds=range(100, 104), repeats=2, progress=told.append)
    lengths = [tracer_length(seed) for seed in range(100, 104) for _ in "12"]
    assert told == [sum(length <= step for length in lengths) for step in range(1, max(lengths) + 1)]


def test_an_environment_that_hangs_ends_it() -> None:
    hangs = EnvConfig(id="fixture_envs:fixture/Faulty-v0", options={"hang_at": 2}, step_timeout=0.5)
    agent = tiny_agent({"obs": (2,)}, (2,))
    with pytest.raises(WorkerError, match="answer"):
        evaluate(agent, hangs, seeds=[1], repeats=1, num_workers=1)


def test_forgetting_changes_what_a_recurrent_agent_does() -> None:
    assert play(greedy=True).per_episode != play(greedy=True, forget_every=1).per_episode
    assert play(greedy=True).per_episode == play(greedy=True, forget_every=100).per_episode


def test_trainer_evaluates_held_out_seeds() -> None:
    with Trainer(tiny()) as trainer:
        result = trainer.evaluate()
    assert result.seeds == [200_000, 200_001, 200_002, 200_003]
    assert len(result.per_episode) == 8
    assert {"success", "return", "length"} == set(result.measures)


def test_the_command_evaluates_as_the_run_does_unless_told_otherwise(tmp_path: Path) -> None:
    settings = {"eval_num_seeds": 3, "eval_first_seed": 300_000, "eval_repeats": 1, "eval_greedy": True}
    with Trainer(tiny(train={**settings, "eval_max_steps": 5}, total_steps=64), tmp_path / "run") as trainer:
        list(trainer)

    def played(*options: str) -> tuple[Any, ...]:
        file = tmp_path / "result.json"
        assert main(["evaluate", str(tmp_path / "run"), "--num-workers", "0", "--json", str(file), *options]) == 0
        result = json.loads(file.read_text())
        result = result[0] if isinstance(result, list) else result
        return tuple(result[key] for key in ("seeds", "repeats", "greedy", "max_steps"))

    levels = [300_000, 300_001, 300_002]
    assert played() == played("--all") == (levels, 1, True, 5)
    asked = ("--sampled", "--num-seeds", "1", "--first-seed", "7", "--repeats", "2", "--max-steps", "9")
    assert played(*asked) == ([7], 2, False, 9)
    assert played("--num-seeds", "2") == (levels[:2], 1, True, 5)


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3, 1, 200)
    e = estimate([[v] for v in values], proportion=False)
    assert e.ci95 is not None
    half = 1.96 * values.std() / 200**0.5  # what the normal approximation says
    assert e.mean == pytest.approx(values.mean())
    assert e.ci95 == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_levels_not_episodes_are_the_unit() -> None:
    """Repeating the same level a hundred times must not make the interval narrower."""
    once = estimate([[0.0], [1.0], [0.0], [1.0]], proportion=True)
    often = estimate([[0.0] * 100, [1.0] * 100, [0.0] * 100, [1.0] * 100], proportion=True)
    assert once == often


def test_intervals_where_all_agree() -> None:
    e = estimate([[1.0, 1.0]] * 50, proportion=True)
    assert e.ci95 == pytest.approx((0.9287, 1.0), abs=1e-3)  # Wilson, 50 of 50
    assert estimate([[0.0]] * 50, proportion=True).ci95 == pytest.approx((0.0, 0.0713), abs=1e-3)
    assert estimate([[7.0]] * 5, proportion=False).ci95 == (7.0, 7.0)
    assert estimate([[7.0]], proportion=False).ci95 is None
