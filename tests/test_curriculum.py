"""A curriculum: what is drawn and when a stage opens, against a plain reference; resumed, in workers, refused.

On two ranks it is in `test_distributed.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import timeless
from reference_curriculum import CONFIG, DELAYS, OWN_DELAY, Record, Row, check, stages_of

from ppo_tbptt.config import ConfigError
from ppo_tbptt.envs import Curriculum, EnvError, Episode, FaultBudget, LevelSeeds, VectorEnv, make_env
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.training.trainer import Trainer


@pytest.mark.parametrize(
    "env", [{}, {"num_envs": 5, "num_workers": 2, "double_buffering": "on"}], ids=["one process", "workers and halves"]
)
def test_draws_and_stages_are_those_of_the_reference(env: dict[str, Any]) -> None:
    config, record = CONFIG.replace(env=env), Record()
    notes: list[str] = []
    rows: list[Row] = []
    with Trainer(config, callbacks=[record]) as trainer:
        for report in trainer:
            rows.append(report.row())
            notes += report.notes
    check(config, rows, record.iterations)
    assert stages_of(rows)[-1] == 3, "else the test has seen too little"
    assert notes == [f"curriculum: stage {k + 1} of 3 is open: {{delay = {DELAYS[k]}}}" for k in (1, 2)]
    lengths = [row["eval/length"] for row in rows if "eval/length" in row]
    assert lengths == [1 + OWN_DELAY] * (len(rows) // 5), "evaluations play the task itself"


def test_interrupted_after_every_iteration(tmp_path: Path) -> None:
    """Also after one that opened a stage, while the next levels are drawn already."""
    with Trainer(CONFIG) as trainer:
        whole = [timeless(report.row()) for report in trainer]
    record, rows = Record(), list[Row]()
    with Trainer(CONFIG, tmp_path / "parts", callbacks=[record]) as trainer:
        rows.append(timeless(next(trainer).row()))
    while len(rows) < len(whole):
        with Trainer.resume(tmp_path / "parts", callbacks=[record]) as trainer:
            assert trainer.notes == []
            rows.append(timeless(next(trainer).row()))
    assert rows == whole
    check(CONFIG, rows, record.iterations)


def test_without_a_stage_only_the_levels_stages_differ() -> None:
    """The same level seeds are played in each environment, with and without a curriculum."""
    plain, staged = LevelSeeds(5, 3, 10, 100), curriculum(seed=5)
    for env in (0, 1, 1, 2, 0, 1) * 5:
        assert staged.peek(env) == plain.peek(env) and staged.begin(env) == plain.begin(env)


def curriculum(*, seed: int = 0, num_envs: int = 3, own_share: float = 0.25, episodes: int = 4) -> Curriculum:
    return Curriculum(seed, num_envs, 10, 100, num_stages=4, own_share=own_share, threshold=0.5, episodes=episodes)


def test_shares_of_the_stages() -> None:
    first = curriculum(num_envs=4000)
    counts = np.bincount([first.stage(env) for env in range(4000)], minlength=5)
    assert counts == pytest.approx([1000, 750, 750, 750, 750], rel=0.15), "first levels are drawn from all stages"
    first.add_scores([(1, 1.0)] * 4)
    assert first.advance() and first.open_stages == 2
    for env in range(4000):
        first.begin(env)
    counts = np.bincount([first.stage(env) for env in range(4000)], minlength=5)
    assert counts.tolist()[3:] == [0, 0] and counts[:3] == pytest.approx([1000, 1500, 1500], rel=0.15)
    assert {curriculum(own_share=1.0).stage(env) for env in range(3)} == {0}


def test_a_stage_opens_when_its_own_last_episodes_reach_the_threshold() -> None:
    levels = curriculum()
    levels.add_scores([(1, 1.0), (1, 0.0), (2, 1.0), (0, 1.0), (1, 1.0)])
    assert levels.score == pytest.approx(2 / 3) and not levels.advance(), "three of four episodes"
    levels.add_scores([(1, 0.0)])
    assert levels.score == 0.5 and levels.advance()
    assert (levels.open_stages, levels.score) == (2, None)
    levels.add_scores([(1, 1.0)] * 9)
    assert not levels.advance()
    levels.add_scores([(2, 0.0)] * 9 + [(2, 1.0)] * 3)
    assert levels.advance()
    levels.add_scores([(3, 1.0)] * 4)
    assert levels.advance()
    levels.add_scores([(4, 1.0)] * 4)
    assert not levels.advance() and levels.open_stages == 4 and levels.score == 1.0


class Staged(LevelSeeds):
    """Environment i's n-th level is of stage (i + n) modulo 3."""

    def __init__(self) -> None:
        super().__init__(3, 4, 0, 100)

    def stage(self, env: int) -> int:
        return (env + self.state_dict()["counts"][env]) % 3


def staged_envs(levels: LevelSeeds, num_workers: int, env_id: str = "ppo_tbptt/DelayedChoice-v0") -> VectorEnv:
    options, stages = {"delay": OWN_DELAY}, [{"delay": 6}, {"delay": 9, "noise": 0.0}]
    how: dict[str, Any] = {"options": options, "stages": stages, "num_workers": num_workers, "replay": True}
    return VectorEnv(env_id, num_envs=4, levels=levels, **how)


def play(envs: VectorEnv, steps: int) -> tuple[list[Episode], list[Any]]:
    episodes: list[Episode] = []
    shown: list[Any] = []
    for step in range(steps):
        episodes += envs.step(np.full((4, 1), step % 4)).episodes
        shown.append(envs.obs["obs"].tolist())
    return episodes, shown


def test_options_of_an_episode_replace_those_of_the_environment_one_by_one() -> None:
    choice = "ppo_tbptt/DelayedChoice-v0"
    env = make_env(choice, options={"delay": 4, "noise": 0.0})
    for options, length in ({"delay": 2}, 3), ({}, 5), ({"delay": 1}, 2):
        env.reset(7, options)
        steps = [env.step(np.array([0])) for _ in range(length)]
        assert steps[-1][2] and not any(step[2] for step in steps[:-1])
        assert all(step[0]["obs"][1:].tolist() == [0.0] * 4 for step in steps), "without noise still"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_environments_return_into_episodes_of_any_stage(num_workers: int) -> None:
    levels = Staged()
    with staged_envs(levels, num_workers) as envs:
        envs.reset()
        episodes, _ = play(envs, 23)
        delays = [OWN_DELAY, 6, 9]
        assert {episode.stage for episode in episodes} == {0, 1, 2}
        assert all(episode.length == delays[episode.stage] + 1 for episode in episodes)
        state, counts = envs.state_dict(), levels.state_dict()
        assert {*state["stage"].tolist()} == {0, 1, 2} and state["steps"].all()
        expected = play(envs, 23)
    levels = Staged()
    levels.load_state_dict(counts)
    with staged_envs(levels, num_workers) as envs:
        assert envs.load_state_dict(state).all()
        assert all(np.array_equal(envs.state_dict()[key], x) for key, x in state.items())
        assert play(envs, 23) == expected
        wrong = {**state, "stage": np.full(4, 7)}
        assert not envs.load_state_dict(wrong).any(), "a stage that does not exist"


def test_episodes_saved_before_there_were_stages_are_of_the_task_itself() -> None:
    with VectorEnv("ppo_tbptt/DelayedChoice-v0", num_envs=4, levels=LevelSeeds(3, 4, 0, 100), replay=True) as envs:
        envs.reset()
        play(envs, 3)
        state = envs.state_dict()
        assert state.pop("stage").tolist() == [0] * 4
        assert envs.load_state_dict(state).all()
        assert [episode.stage for episode in play(envs, 6)[0]] == [0] * 4


def test_a_restarted_worker_knows_the_stages() -> None:
    levels = Staged()
    stages = [{"delay": 6}, {"delay": 9}]
    how: dict[str, Any] = {"stages": stages, "num_workers": 1, "faults": FaultBudget(1)}
    with VectorEnv("ppo_tbptt/DelayedChoice-v0", num_envs=4, levels=levels, **how) as envs:
        envs.reset()
        psutil.Process(envs.worker_pids[0]).kill()
        result = envs.step(np.zeros((4, 1), np.int64))
        assert result.failed is not None and result.failed.all()
        episodes, _ = play(envs, 30)
        assert {episode.stage for episode in episodes} == {0, 1, 2}
        assert all(episode.length == [7, 6, 9][episode.stage] + 1 for episode in episodes)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_options_of_every_stage_are_checked_at_the_start(num_workers: int) -> None:
    config = CONFIG.replace(env={"num_workers": num_workers, "curriculum": {"stages": [{"delay": 1}, {"dely": 2}]}})
    with pytest.raises(EnvError, match=r"env\.curriculum\.stages\[1\]: .*unknown reset option 'dely'.*'delay'"):
        Trainer(config)


def test_what_would_be_silent_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.eval_every: eval_every = 0 with a curriculum.*at least 1"):
        CONFIG.replace(train={"eval_every": 0})
    assert CONFIG.replace(train={"eval_every": 0}, env={"curriculum": {"stages": []}}).train.eval_every == 0
    with pytest.raises(ConfigError, match=r"env\.curriculum\.threshold: 30\.0 is more than success.*at most 1\.0"):
        Trainer(CONFIG.replace(env={"curriculum": {"threshold": 30}}))
    envs = VectorEnv("ppo_tbptt/DelayedChoice-v0", num_envs=6, levels=LevelSeeds(0, 6, 0, 9))
    with pytest.raises(ConfigError, match=r"env\.curriculum\.stages: .*handed in"):
        Trainer(CONFIG, envs=envs)
    with pytest.raises(ConfigError, match=r"env\.curriculum\.stages: 3 .*a list, each a table"):
        CONFIG.replace(env={"curriculum": {"stages": 3}})


def test_what_may_change_on_resume(tmp_path: Path) -> None:
    with Trainer(CONFIG, tmp_path / "run") as trainer:
        next(trainer)
        tree = trainer.state_dict()
    with pytest.raises(ConfigError, match=r"env\.curriculum\.stages: the run was started with"):
        Trainer.resume(tmp_path / "run", {"env.curriculum.stages": [{"delay": 1}]})
    with Trainer.resume(tmp_path / "run", {"env.curriculum.threshold": 0.0, "env.curriculum.episodes": 1}) as trainer:
        assert [report.scalars["curriculum/stage"] for report in trainer][-1] == 3
    for wrong in ({"open_stages": 4}, {"open_stages": 0}, {"next_stages": [9] * 6}, {"scores": ["x"]}):
        with pytest.raises(CheckpointError):
            Trainer(CONFIG, restore={**tree, "curriculum": {**tree["curriculum"], **wrong}})
