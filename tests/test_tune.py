"""Tuning: trials are pruned or kept, an interrupted study ends as if nothing had happened, bad spaces are refused."""

import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from configs_for_tests import tiny, write
from helpers import refusal, timeless
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, create_trial

from ppo_tbptt.analysis.tuning import draw, importances
from ppo_tbptt.cli import main
from ppo_tbptt.commands.console import figure
from ppo_tbptt.config import Config
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.runtime.errors import RunError
from ppo_tbptt.training.trainer import Trainer

SPACE = """
"env.options.length" = { low = 2, high = 20 }
"ppo.learning_rate.initial" = { low = 1e-3, high = 1e-1, log = true }
"core.kind" = ["gru", "none"]
"model.vector_hidden_sizes" = { values = [[8], [8, 16]] }
ppo.num_epochs = { low = 1, high = 3, step = 2 }
ppo.gamma = { low = 0, high = 1 }
"""
"""The measure, an episode's return, is its length, so that it is known what is to be pruned."""
ITERATION, STEPS = 64, 192


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and a space."""
    folder = tmp_path_factory.mktemp("tune")
    evaluation = {"eval_every": 1, "eval_num_seeds": 2, "eval_repeats": 1}
    config = tiny(env={"id": "ppo_tbptt/Truncate-v0"}, train=evaluation, total_steps=STEPS)
    write(folder, config.to_toml(), "config.toml")
    write(folder, SPACE, "space.toml")
    return folder


def arguments(files: Path, out: Path, trials: int, *options: str) -> list[str]:
    needed = [
        "--space",
        str(files / "space.toml"),
        "--out",
        str(out),
        "--trials",
        str(trials),
        "--jobs",
        "0",
        "--seed",
        "5",
    ]
    return ["tune", str(files / "config.toml"), *needed, *options]


@pytest.fixture(scope="module")
def finished(files: Path) -> Path:
    """A study of ten trials."""
    assert main(arguments(files, files / "finished", 10)) == 0
    return files / "finished"


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "tune.json").read_text())


def evaluations(out: Path) -> list[dict[int, float]]:
    """Of all trials, by steps, from the study's file."""
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{out}/study.db")
    return [trial.intermediate_values for trial in study.trials]


def halved(values: list[float]) -> Iterator[int]:
    """Steps of trials that end with these values: at 24, 48 and 96 only the better half goes on (of one: that one)."""
    rungs: dict[int, list[float]] = {24: [], 48: [], 96: []}
    for value in values:
        env_steps = STEPS
        for rung, so_far in rungs.items():
            so_far.append(value)
            if value < sorted(so_far, reverse=True)[max(1, len(so_far) // 2) - 1]:
                env_steps = ITERATION * -(-rung // ITERATION)  # there is an evaluation after each iteration
                break
        yield env_steps


def test_trials_are_runs_and_the_worse_half_is_pruned(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = results(finished)["trials"]
    assert [row["trial"] for row in rows] == [f"trial_{number:04d}" for number in range(10)]
    assert [row["env_steps"] for row in rows] == [*halved([row["value"] for row in rows])]
    every = [range(ITERATION, row["env_steps"] + 1, ITERATION) for row in rows]
    assert [list(values) for values in evaluations(finished)] == [list(steps) for steps in every]
    assert [row["state"] for row in rows[:2]] == ["finished", "pruned"]
    for row in rows:
        run, drawn, value = finished / row["trial"], row["params"], row["value"]
        config = Config.load(run / "config.toml")
        assert config.train.eval_first_seed == 300_000
        assert config.env.options == {"length": drawn["env.options.length"]} == {"length": value}
        assert config.ppo.learning_rate.initial == drawn["ppo.learning_rate.initial"]
        assert config.core.kind == drawn["core.kind"] and config.ppo.gamma == drawn["ppo.gamma"]
        assert list(config.model.vector_hidden_sizes) == json.loads(drawn["model.vector_hidden_sizes"])
        metrics = read_metrics(run / "metrics.jsonl")
        assert {row["eval/return"] for row in metrics} == {value} and metrics[-1]["env_steps"] == row["env_steps"]
        is_whole = row["env_steps"] == STEPS
        assert (row["state"], row["ci95"]) == (("finished", [value, value]) if is_whole else ("pruned", None))
        assert (run / f"checkpoints/iteration_{len(metrics):07d}.pt").is_file()
    assert main(["compare", *(str(finished / row["trial"]) for row in rows)]) == 0
    assert "Truncate" in capsys.readouterr().out


def test_it_leaves_a_table_a_figure_and_the_best_config(finished: Path, tmp_path: Path) -> None:
    result = results(finished)
    ends = {row["trial"]: row["value"] for row in result["trials"] if row["state"] == "finished"}
    best = result["best"]
    value = ends[best]
    assert result["headline"] == "return" and value == max(ends.values())
    text = (finished / "best.toml").read_text()
    assert f"{best}, return {figure(value)} [" in text and "level seeds 300000 to 300001" in text
    again = tmp_path / "again"
    assert main(["train", str(finished / "best.toml"), "--run-dir", str(again)]) == 0
    first, same = ([timeless(row) for row in read_metrics(run / "metrics.jsonl")] for run in (finished / best, again))
    assert first == same
    table = (finished / "tune.md").read_text().splitlines()
    assert table[0].startswith("| trial | state | steps | return | 95 % interval | env.options.length | ppo.learning")
    assert table[2].startswith(f"| {best} | finished | {STEPS} | {value:.3f} | {value:.3f} to {value:.3f} |")
    assert (finished / "importances.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["importances"]) == 6 and next(iter(result["importances"])) == "env.options.length"


def test_a_finished_study_prints_its_table_at_once(
    files: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("trial*/**/*")}
    capsys.readouterr()
    assert main(arguments(files, finished, 10)) == 0
    out = capsys.readouterr().out
    assert "begins" not in out and "goes on" not in out
    assert all(text in out for text in ("trial_0009", "pruned", "vector_hidden_sizes", "best.toml"))
    assert {path: path.stat().st_mtime_ns for path in finished.glob("trial*/**/*")} == before


class Killed(BaseException):
    """Stands for kill -9."""


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, at: int, how: Callable[[], Any]) -> None:
    """Call ``how`` before the calls of a method from number ``at`` on, counted from 0."""
    calls, following = itertools.count(), getattr(owner, method)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= at:
            how()
        return following(*args, **kwargs)

    monkeypatch.setattr(owner, method, call)


@pytest.mark.parametrize(
    ("owner", "method", "at"),
    [
        (Trainer, "__next__", 1),  # before the first checkpoint
        (optuna.Trial, "report", 1),  # a checkpoint is newer than what the study knows
        (optuna.Study, "tell", 0),  # that the first is finished
        (optuna.Study, "ask", 1),
        (Trainer, "save", 0),  # of the second, which is pruned
        (optuna.Study, "tell", 1),
    ],
)
def test_a_killed_study_goes_on_and_ends_as_if_nothing_had_happened(
    owner: type, method: str, at: int, files: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        interrupt(patch, owner, method, at, kill)
        with pytest.raises(Killed):
            main(arguments(files, tmp_path / "out", 2))
    assert main(arguments(files, tmp_path / "out", 2)) == 0
    assert results(tmp_path / "out")["trials"] == results(finished)["trials"][:2]
    assert evaluations(tmp_path / "out") == evaluations(finished)[:2]


def test_a_signal_stops_a_process_with_a_checkpoint_and_leaves_the_table(
    files: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes while the first evaluation is told; then the trial goes on in this process."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, optuna.Trial, "report", 0, lambda: signal.raise_signal(signal.SIGTERM))
        assert main(arguments(files, out, 1, "--jobs", "1")) == 143
    (row,) = results(out)["trials"]
    assert (row["trial"], row["state"], row["env_steps"]) == ("trial_0000", "unfinished", ITERATION)
    assert [*(out / "trial_0000/checkpoints").glob("iteration_*.pt")] and not (out / "best.toml").exists()
    assert "too few" in capsys.readouterr().out
    assert main(arguments(files, out, 1)) == 0
    assert "trial_0000 goes on" in capsys.readouterr().out
    assert evaluations(out) == evaluations(finished)[:1]


def test_when_time_is_up_the_trial_ends_with_a_checkpoint_and_no_other_begins(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clock = tmp_path / "out", "ppo_tbptt.commands.stop.monotonic"
    monkeypatch.setattr(clock, lambda: 0.0)
    interrupt(monkeypatch, Trainer, "__next__", 1, lambda: monkeypatch.setattr(clock, lambda: 601.0))
    assert main(arguments(files, out, 3, "--minutes", "10")) == 124
    (row,) = results(out)["trials"]
    assert (row["trial"], row["state"], row["env_steps"]) == ("trial_0000", "unfinished", 2 * ITERATION)
    assert (out / "trial_0000/checkpoints/iteration_0000002.pt").is_file()


def test_a_trial_that_fails_is_told_and_does_not_end_the_study(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RunError("10 updates in a row")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, Trainer, "evaluate", 4, fail)  # in the second trial, and in all that follow
        assert main(arguments(files, out, 3)) == 1
    assert [row["state"] for row in results(out)["trials"]] == ["finished", "failed", "failed"]
    assert "error: trial_0001: 10 updates in a row\n" in capsys.readouterr().err
    assert main(arguments(files, out, 2)) == 0  # another takes its place
    assert results(out)["trials"][3]["state"] in ("finished", "pruned")


def test_values_that_do_not_go_together_are_not_tried(files: Path, tmp_path: Path) -> None:
    """Each is right with some value of the other: 64 needs a longer rollout than the config's 16."""
    space = write(tmp_path, '"ppo.sequence_length" = [4, 64, "none"]\n"ppo.rollout_steps" = [8, 64]')
    out = tmp_path / "out"
    assert main(arguments(files, out, 5, "--space", str(space), "--total-steps", "32")) == 0
    drawn = [row["params"] for row in results(out)["trials"]]
    assert len(drawn) == 5 < len(evaluations(out)) and {row["ppo.sequence_length"] for row in drawn} == {4, 64, "none"}
    assert all(row["ppo.rollout_steps"] == 64 for row in drawn if row["ppo.sequence_length"] == 64)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--ppo.gae-lambda", "0.5"], "finished: begun with other settings (ppo.gae_lambda: 0.95 -> 0.5)"),
        (["--seed", "1"], "(--seed: 5 -> 1)"),
        (["--prune-from", "64"], "(--prune-from: 24 -> 64)"),
        (["--space", "other.toml"], "(ppo.num_epochs: {'low': 1, 'high': 3, 'step': 2} -> None)"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    option: list[str], says: str, files: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files, SPACE.replace("ppo.num_epochs", "#"), "other.toml")
    option = [str(files / part) if part.endswith(".toml") else part for part in option]
    assert says in refusal(capsys, *arguments(files, finished, 11, *option))


ONE = '"core.hidden_size" = [8]'
WRONG = {
    "no TOML": ("a = ", "s.toml: not valid TOML"),
    "nothing": ("# nothing", "s.toml: nothing to search; must have lines like"),
    "unknown key": ('"ppo.gama" = [0.9]', "s.toml: ppo.gama: unknown, with value 0.9; did you mean ppo.gamma?"),
    "a number": ('"ppo.gamma" = 0.9', "s.toml: ppo.gamma: 0.9 is no range or choice; must be like [1, 2]"),
    "out of range": (
        "ppo.gamma = { low = 0.5, high = 1.5 }",
        "s.toml: ppo.gamma: 1.5 is not allowed; must be a number",
    ),
    "wrong choice": ('"core.kind" = ["gru", "gur"]', 's.toml: core.kind: "gur" is not allowed; must be one of "none"'),
    "fraction": (
        '"ppo.num_epochs" = { low = 1.5, high = 3 }',
        "ppo.num_epochs: 1.5 is not allowed; must be a whole number",
    ),
    "upside down": (
        '"ppo.gamma" = { low = 1, high = 0.5 }',
        "s.toml: ppo.gamma: low: 1 is above high = 0.5; must be at most",
    ),
    "log of 0": ('"ppo.gamma" = { low = 0, high = 1, log = true }', "ppo.gamma: low: 0 is not allowed with log = true"),
    "log and step": (
        '"ppo.gamma" = { low = 0.1, high = 0.3, step = 0.1, log = true }',
        "ppo.gamma: step: 0.1 is not allowed",
    ),
    "not reached": (
        '"ppo.num_epochs" = { low = 1, high = 4, step = 2 }',
        "ppo.num_epochs: high: 4 is not low = 1 and steps",
    ),
    "unknown part": (
        '"ppo.gamma" = { low = 0.1, hihg = 1 }',
        "ppo.gamma: hihg: unknown, with value 1; did you mean high?",
    ),
    "no high": ('"ppo.gamma" = { low = 0.1 }', "s.toml: ppo.gamma: high: missing; must be"),
    "no choice": ('"ppo.gamma" = []', "s.toml: ppo.gamma: values: [] is not allowed; must be a list of at least 1"),
    "twice": ('"ppo.gamma" = [0.9, 0.9]', "s.toml: ppo.gamma: [0.9, 0.9] has equal values; must be different ones"),
    "a date": ('"ppo.gamma" = [2020-01-01]', 's.toml: ppo.gamma: "<date>" is not allowed; must be made of text'),
    "a part": ('"ppo.clip_range" = [0.1]\n"ppo.clip_range.initial" = [1]', "ppo.clip_range: it and its part"),
    "conflict": ('"ppo.sequence_length" = [4, 64]\n' + ONE, "ppo.sequence_length: sequence_length = 64 is longer than"),
    "measure": ('"train.eval_repeats" = [1, 2]', "train.eval_repeats: decides how trials are compared"),
    "steps": ('"total_steps" = [1, 2]', "total_steps: decides how trials are compared"),
    "environment": ('"env.options.nonsense" = [1]', "s.toml: env.options.nonsense: "),
}


@pytest.mark.parametrize(("space", "says"), WRONG.values(), ids=WRONG)
def test_wrong_spaces_are_refused(
    space: str, says: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, space, "s.toml")
    assert says in refusal(capsys, *arguments(files, tmp_path / "out", 1, "--space", str(path)))
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*options: str) -> str:
        return refusal(capsys, *arguments(files, tmp_path / "out", 1, *options))

    assert "config.toml: train.eval_every: 0 is not allowed" in says("--train.eval-every", "0")
    assert "ppo.gamma: set on the command line too" in says("--ppo.gamma", "0.5")
    assert "at least 1" in says("--trials", "0")
    assert "held-out seeds must not overlap them" in says("--train.eval-first-seed", "99")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "nonsense" * 1000, "study.db")
    assert "study.db: no study of optuna (" in says()
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert "tune needs optuna; install it with: pip install 'ppo-tbptt[tune]'" in says()


def trials(values: list[float]) -> list[FrozenTrial]:
    """Trials whose value is one of their parameters'; there is another."""
    space = {"a.first": FloatDistribution(0, 1), "b.second": FloatDistribution(0, 1)}
    return [
        create_trial(params={"a.first": value, "b.second": (7 * i % 20) / 20}, distributions=dict(space), value=value)
        for i, value in enumerate(values)
    ]


def test_importances_name_the_parameter_that_matters() -> None:
    shares = importances(trials([i / 20 for i in range(20)]))
    assert [*shares] == ["a.first", "b.second"] and shares["a.first"] > 0.8
    assert importances(trials([i / 20 for i in range(9)])) == {}  # too few
    assert importances(trials([0.5] * 20)) == {}  # all the same
    (axes,) = draw(shares, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a.first", "b.second"]
    assert [bar.get_width() for bar in axes.patches] == [*shares.values()]  # type: ignore[attr-defined]
