"""A run with a curriculum as plain loops: which levels and stages are played, and when a stage opens."""

import numpy as np
import pytest
from configs_for_tests import tiny

from ppo_tbptt.config import Config
from ppo_tbptt.envs import Episode, LevelSeeds
from ppo_tbptt.training.callbacks import Callback, Iteration

DELAYS = [0, 2, 1]
OWN_DELAY = 4
CONFIG = tiny(
    env={
        "id": "ppo_tbptt/DelayedChoice-v0",
        "num_envs": 6,
        "options": {"delay": OWN_DELAY, "noise": 0.5},
        "curriculum": {
            "stages": [{"delay": delay} for delay in DELAYS],
            "threshold": 0.25,
            "episodes": 4,
            "own_share": 0.25,
        },
    },
    ppo={"rollout_steps": 12},
    train={"eval_every": 5, "checkpoint_every": 1},
    total_steps=720,
)
"""An episode of stage k takes one step more than its delay, whatever is done; success is a quarter by chance."""

Row = dict[str, float]


class Record(Callback):
    """Keeps the gathered episodes of each iteration."""

    def __init__(self) -> None:
        self.iterations: list[list[Episode]] = []

    def after_iteration(self, iteration: Iteration) -> None:
        self.iterations.append(list(iteration.episodes))


def draw_stage(config: Config, env: int, number: int, num_open: int) -> int:
    sequence = np.random.SeedSequence(config.seed, spawn_key=(env, number, 1))
    rng = np.random.Generator(np.random.Philox(sequence))
    if rng.random() < config.env.curriculum.own_share:
        return 0
    return 1 + int(rng.integers(num_open if number else len(DELAYS)))


def check(config: Config, rows: list[Row], iterations: list[list[Episode]], ranks: int = 1) -> None:
    """Hold a run against a loop over steps and environments that takes nothing from it but who succeeded."""
    num, plan, seeds = config.env.num_envs, config.env.curriculum, LevelSeeds(config.seed, 99, 0, 100_000)
    num_open, scores = 1, list[float]()
    number = [0] * num * ranks
    stage = [draw_stage(config, env, 0, 1) for env in range(num * ranks)]
    pending = [draw_stage(config, env, 1, 1) for env in range(num * ranks)]
    left = [1 + [OWN_DELAY, *DELAYS][k] for k in stage]
    for row, episodes in zip(rows, iterations, strict=True):
        expected: list[tuple[int, int, int, int]] = []  # time, environment, seed, stage
        for t in range(config.ppo.rollout_steps):
            for env in range(num * ranks):
                left[env] -= 1
                if left[env] == 0:
                    expected.append((t, env, seeds.begin(env), stage[env]))
                    number[env] += 1
                    stage[env], pending[env] = pending[env], draw_stage(config, env, number[env] + 1, num_open)
                    left[env] = 1 + [OWN_DELAY, *DELAYS][stage[env]]
        by_rank = sorted(expected, key=lambda ended: ended[1] // num)
        found = [(episode.step, episode.index, episode.seed, episode.stage) for episode in episodes]
        assert found == [(t, env % num, seed, stage) for t, env, seed, stage in by_rank]
        success = {ended: episode.measures["success"] for ended, episode in zip(by_rank, episodes, strict=True)}
        scores += [success[ended] for ended in expected if ended[3] == num_open]
        last = scores[-plan.episodes :]
        assert row["curriculum/stage"] == num_open
        assert row.get("curriculum/headline") == (pytest.approx(sum(last) / len(last)) if last else None)
        if len(last) == plan.episodes and sum(last) / len(last) >= plan.threshold and num_open < len(DELAYS):
            num_open, scores = num_open + 1, []


def stages_of(rows: list[Row]) -> list[float]:
    return [row["curriculum/stage"] for row in rows]
