"""Held-out evaluation: what test_reference_evaluation.py, in one process, does not show."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from fixture_envs import tracer_length
from helpers import tiny_agent

from ppo_tbptt.cli import main
from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import WorkerError
from ppo_tbptt.evaluation.evaluate import Evaluation, evaluate
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


def test_levels_are_played_three_times_by_default() -> None:
    found = evaluate(tracer_agent(), EnvConfig(id="fixture_envs:fixture/Tracer-v0"), seeds=[100])
    assert found.repeats == 3 and found == play(seeds=[100])


def test_the_number_of_workers_changes_nothing() -> None:
    results = [play(num_workers=n) for n in (0, 1, 3)]
    assert results[0] == results[1] == results[2]


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
