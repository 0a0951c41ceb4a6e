"""A run's curves are those of the episodes that its environments have seen, in the reports and in every file."""

import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import timeless, train
from recorded_envs import Log, Played, Step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from ppo_tbptt.config import Config
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.trainer import Trainer

LONG = tiny(
    seed=5,
    total_steps=14 * 18,
    env={
        "id": "recorded_envs:recorded/Vector-v0",
        "num_envs": 3,
        "first_seed": 40,
        "num_seeds": 500,
        "max_episode_steps": 13,
        "options": {"longest": 20},
    },
    ppo={"rollout_steps": 6, "sequence_length": 4, "learning_rate": 0.01},
    train={"checkpoint_every": 4, "eval_num_seeds": 3, "eval_repeats": 2},
)
"""Episodes are longer than rollouts, as a rule."""
SHORT = LONG.replace(
    total_steps=23 * 64 + 1,
    env={"num_envs": 8, "options": {"longest": 9}},
    ppo={"rollout_steps": 8, "num_epochs": 1},
    train={"checkpoint_every": 3},
)
"""24 iterations, each with about a dozen episodes that end by themselves."""

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def new_log() -> None:
    """Every test has a log of its own."""
    Log.begin()


# --- what the log says -----------------------------------------------------------------------------------------------


def of_env(log: list[Played], env: int) -> list[Played]:
    return [played for played in log if played.env == env]


def is_over(played: Played, config: Config) -> bool:
    if not played.steps:
        return False
    last = played.steps[-1]
    return last.terminated or last.truncated or len(played.steps) == config.env.max_episode_steps


def episodes_of(log: list[Played], config: Config) -> list[list[Played]]:
    """Those that ended in each iteration, in order of time, then environment."""
    ended: list[list[tuple[int, int, Played]]] = [[] for _ in range(config.num_iterations)]
    for env in range(config.env.num_envs):
        step = 0
        for played in of_env(log, env):
            step += len(played.steps)
            if is_over(played, config):
                ended[(step - 1) // config.ppo.rollout_steps].append((step, env, played))
    return [[played for *_, played in sorted(some, key=lambda end: end[:2])] for some in ended]


def curves(log: list[Played], config: Config) -> list[Row]:
    """Everything about the episodes in the row of each iteration."""
    rows: list[Row] = []
    for i, episodes in enumerate(episodes_of(log, config)):
        env_steps = (i + 1) * config.ppo.rollout_steps * config.env.num_envs
        row: Row = {"iteration": i + 1, "env_steps": env_steps, "episode/count": len(episodes)}
        infos = [played.steps[-1].info for played in episodes]
        columns = {
            "episode/return": [sum(step.reward for step in played.steps) for played in episodes],
            "episode/length": [len(played.steps) for played in episodes],
            "episode/success": [info.get("success", 0.0) for info in infos],
        }
        for name in ("moved", "progress", "success", "even", "bonus"):
            columns[f"env/{name}"] = [float(info[name]) for info in infos if name in info]
        rows.append(row | {tag: sum(values) / len(values) for tag, values in columns.items() if values})
    return rows


def level_seed(config: Config, env: int, number: int) -> int:
    """Of an environment's episode, counted from 0."""
    sequence = np.random.SeedSequence(config.seed, spawn_key=(env, number))
    drawn = np.random.Generator(np.random.Philox(sequence)).integers(config.env.num_seeds)
    return config.env.first_seed + int(drawn)


# --- what the run says -----------------------------------------------------------------------------------------------


def about_episodes(row: Row) -> Row:
    prefixes = ("episode/", "env/")
    return {key: x for key, x in row.items() if key in ("iteration", "env_steps") or key.startswith(prefixes)}


def metrics(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_rows(found: list[Row], expected: list[Row]) -> None:
    assert len(found) == len(expected)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-12, abs=1e-12)  # also the same keys


def assert_shown(run: Path) -> None:
    """TensorBoard's own reader finds the points of the metrics, each once, and no others."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    points: dict[str, list[tuple[int, float]]] = {}
    for row in metrics(run):
        for tag in row.keys() - {"iteration", "env_steps"}:
            points.setdefault(tag, []).append((row["env_steps"], float(np.float32(row[tag]))))
    shown = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert shown == points
    # Nor does it only pass over what a resumed run has made void: that is not in the files.
    events = [event for path in run.glob("events.out.tfevents.*") for event in LegacyEventFileLoader(str(path)).Load()]
    stored = Counter(
        (value.tag, event.step)
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    )
    assert stored == Counter((tag, step) for tag, some in points.items() for step, _ in some)


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_buffering", ["off", "on"])
def test_curves_are_those_of_the_recorded_episodes(double_buffering: str, tmp_path: Path) -> None:
    config = LONG.replace(env={"double_buffering": double_buffering})
    with Trainer(config, tmp_path / "run") as trainer:
        reports = list(trainer)
    log = Log.take()
    expected = curves(log, config)
    assert_rows([about_episodes(report.row()) for report in reports], expected)
    assert metrics(tmp_path / "run") == [report.row() for report in reports]
    assert_shown(tmp_path / "run")

    # Every environment plays the levels that its stream of seeds says.
    assert {played.env for played in log} == {0, 1, 2}
    for env in range(3):
        own = of_env(log, env)
        assert [played.seed for played in own] == [level_seed(LONG, env, k) for k in range(len(own))]
        assert all(is_over(played, LONG) for played in own[:-1]) and not is_over(own[-1], LONG)
        assert sum(len(played.steps) for played in own) == 14 * 6
    assert all(played.options == {"longest": 20} for played in log)
    assert {step.action for played in log for step in played.steps} == {(i, j) for i in range(3) for j in range(2)}


def test_a_resumed_run_has_the_curves_of_one_that_was_left_alone(tmp_path: Path) -> None:
    """It is left after these iterations, which are in the metrics and in no checkpoint."""
    parts = tmp_path / "parts"
    whole = train(LONG)
    log = Log.take()

    trainer = Trainer(LONG, parts)
    for stop in (5, 7, 11):
        with trainer:
            while trainer.iteration < stop:
                next(trainer)
        assert [row["iteration"] for row in metrics(parts)] == list(range(1, stop + 1))
        assert_shown(parts)
        Log.begin()
        trainer = Trainer.resume(parts)
        assert trainer.iteration == stop - stop % 4 and trainer.notes == []
        assert [row["iteration"] for row in metrics(parts)] == list(range(1, trainer.iteration + 1))
    resumed_from = trainer.iteration
    with trainer:
        list(trainer)

    assert_rows([about_episodes(row) for row in metrics(parts)], curves(log, LONG))
    assert [timeless(row) for row in metrics(parts)] == whole
    assert_shown(parts)
    again = Log.take()
    for env in range(3):
        wanted = from_step(of_env(log, env), resumed_from * LONG.ppo.rollout_steps)
        assert [(played.seed, played.steps) for played in of_env(again, env)] == wanted


def from_step(own: list[Played], steps: int) -> list[tuple[int, list[Step]]]:
    """The episode that an environment is in after so many steps, from its start, and all later ones."""
    done = list(accumulate(len(played.steps) for played in own))
    ended = sum(end <= steps for end in done)
    assert 0 < ended < len(own)
    return [(played.seed, played.steps) for played in own[ended:]]


def test_the_mean_of_100_episodes_decides_which_weights_are_best(tmp_path: Path) -> None:
    """Where there are no evaluations. A run that is left and resumed counts the episodes from before."""
    train(SHORT)
    expected = bests(Log.take(), SHORT)
    assert len(set(expected)) >= 3  # none, and at least two

    file = tmp_path / "run" / "checkpoints" / "best.pt"
    weights: dict[int, dict[str, torch.Tensor]] = {}
    for stop in (8, 17, 24):
        trainer = Trainer.resume(tmp_path / "run") if weights else Trainer(SHORT, tmp_path / "run")
        with trainer:
            while trainer.iteration < stop:
                next(trainer)
                weights[trainer.iteration] = {name: x.clone() for name, x in trainer.agent.state_dict().items()}
                score, iteration = expected[trainer.iteration - 1]
                assert trainer.checkpoints.best == score
                assert file.exists() == (iteration is not None)
                if iteration is not None:
                    saved = load_checkpoint(file)
                    assert (saved["best"], saved["iteration"]) == (score, iteration)
                    assert all(torch.equal(x, weights[iteration][name]) for name, x in saved["agent"].items())


class Scores(Callback):
    """Takes the returns of the episodes and the score of each iteration."""

    def __init__(self) -> None:
        self.returns: list[float] = []
        self.scores: list[float | None] = []

    def after_iteration(self, iteration: Iteration) -> None:
        self.returns += [episode.ret for episode in iteration.episodes]
        mean = float(np.mean(self.returns[-100:]))
        assert iteration.score == (None if iteration.score is None else pytest.approx(mean, rel=1e-12))
        self.scores.append(iteration.score)


@pytest.mark.parametrize(("every", "when"), [(1, [2, 3, 4, 5]), (3, [3, 5]), (50, [5])])
def test_the_score_is_computed_when_a_checkpoint_is_due(every: int, when: list[int], tmp_path: Path) -> None:
    """64 episodes of one step end in each iteration."""
    config = tiny(total_steps=5 * 64, env={"id": "ppo_tbptt/ProbeObservation-v0"}, train={"checkpoint_every": every})
    with Trainer(config, tmp_path / "run", callbacks=[scores := Scores()]) as trainer:
        list(trainer)
        assert len(set(scores.returns)) > 1
        assert [number for number, score in enumerate(scores.scores, 1) if score is not None] == when
        assert trainer.checkpoints.best == max(score for score in scores.scores if score is not None)


def test_histograms_of_the_first_iteration(tmp_path: Path) -> None:
    with Trainer(tiny(), tmp_path / "run") as trainer:
        next(trainer)
    board = EventAccumulator(str(tmp_path / "run")).Reload()
    assert set(board.Tags()["histograms"]) == {"hist/state", "hist/value", "hist/advantage"}
    for tag, count in {"hist/state": 64 * 8, "hist/value": 64, "hist/advantage": 64}.items():
        (event,) = board.Histograms(tag)
        assert (event.step, event.histogram_value.num) == (64, count)


def bests(log: list[Played], config: Config) -> list[tuple[float | None, int | None]]:
    """After each iteration: the best mean success so far, and of which iteration.

    It is taken when a checkpoint is due, over the last 100 episodes, once there are so many.
    """
    best: tuple[float | None, int | None] = (None, None)
    after: list[tuple[float | None, int | None]] = []
    successes: list[float] = []
    for iteration, episodes in enumerate(episodes_of(log, config), 1):
        successes += [played.steps[-1].info["success"] for played in episodes]
        due = iteration % config.train.checkpoint_every == 0 or iteration == config.num_iterations
        if due and len(successes) >= 100:
            score = sum(successes[-100:]) / 100
            if best[0] is None or score > best[0]:
                best = score, iteration
        after.append(best)
    return after
