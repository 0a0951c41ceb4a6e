"""The ablation: its runs are trained once, interrupted ones go on, and its table tells what differs from what."""

import itertools
import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from configs_for_tests import tiny
from helpers import refusal
from runs_for_tests import add_evaluation
from torch import Tensor

from ppo_tbptt.analysis.ablation import (
    CORE,
    DELAY,
    DELAYS,
    LENGTH,
    LENGTHS,
    STORED,
    WAYS,
    Setting,
    Trial,
    ZeroStates,
    draw,
    read_outcomes,
    results,
    trials,
    verdict,
)
from ppo_tbptt.cli import main
from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.statistics import permutation_p
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.trainer import Trainer

CONFIG = Path(__file__).parents[1] / "configs" / "toy_delayed_choice.toml"
SMALL = ["--env.num-envs", "4", "--ppo.rollout-steps", "16", "--total-steps", "192", "--device", "cpu"]
SMALL += ["--train.eval-num-seeds", "4", "--train.checkpoint-every", "1"]


def ablate(folder: Path, *options: str) -> int:
    return main(["ablate", str(CONFIG), "--out", str(folder), "--jobs", "0", *SMALL, *options])


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two runs of one cell."""
    folder = tmp_path_factory.mktemp("ablate") / "runs"
    assert ablate(folder, "--only", "gru_delay3_length4") == 0
    return folder


def test_it_leaves_runs_a_table_and_a_figure(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"gru_delay3_length4_seed{seed}" for seed in (1, 2)]
    files = ["ablation.json", "ablation.md", "ablation.png"]
    assert sorted(path.name for path in finished.iterdir()) == [*files, *names]
    (row,) = json.loads((finished / "ablation.json").read_text())
    finals = [json.loads((finished / name / "evaluations/final.json").read_text()) for name in names]
    means = [final["measures"]["success"]["mean"] for final in finals]
    assert (row["by_seed"], row["success"]) == (dict(zip("12", means, strict=True)), fmean(means))
    assert "| gru | 3 | 4 | stored state | 2 |" in (finished / "ablation.md").read_text()
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", *(str(finished / name) for name in names)]) == 0  # they are runs like any other
    assert "DelayedChoice" in capsys.readouterr().out


def test_finished_runs_are_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = list(finished.glob("gru*"))
    before = [contents(run) for run in runs]
    capsys.readouterr()
    assert ablate(finished, "--only", "gru_delay3_length4") == 0
    out = capsys.readouterr().out
    assert "ablation.png" in out and "run 1 of" not in out
    assert ablate(finished, "--draw-only") == 0  # nor are the others begun
    assert [contents(run) for run in runs] == before
    assert sorted(finished.glob("gru*")) == sorted(runs)


def test_an_interrupted_run_goes_on_and_an_unstarted_one_begins(finished: Path, tmp_path: Path) -> None:
    """They end as if nothing had happened; so does a run in a process of its own."""
    folder = tmp_path / "again"
    shutil.copytree(finished, folder)
    first, second = (folder / f"gru_delay3_length4_seed{seed}" for seed in (1, 2))
    (first / "evaluations/final.json").unlink()
    (first / "checkpoints/iteration_0000003.pt").unlink()
    shutil.rmtree(second)
    assert ablate(folder, "--only", "gru_delay3_length4", "--jobs", "1") == 0
    for run in (first, second):
        same = finished / run.name
        rows = [row["episode/success"] for row in read_metrics(run / "metrics.jsonl")]
        assert rows == [row["episode/success"] for row in read_metrics(same / "metrics.jsonl")] and len(rows) == 3
        ends = [json.loads((of / "evaluations/final.json").read_text()) for of in (run, same)]
        assert ends[0]["per_episode"] == ends[1]["per_episode"]


def test_a_file_is_no_folder_for_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("kept")
    error = refusal(capsys, "ablate", CONFIG, "--out", tmp_path / "x", *SMALL)
    assert "--out" in error and "is a file" in error and (tmp_path / "x").read_text() == "kept"


def test_other_settings_in_the_same_folder_are_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(finished)
    error = refusal(capsys, "ablate", CONFIG, "--out", finished, *SMALL, "--ppo.gamma", "0.5")
    assert "gru_delay3_length4_seed1: begun with other settings (ppo.gamma: 0.0 -> 0.5)" in error
    assert contents(finished) == before


def test_without_a_finished_run_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablate(tmp_path / "nothing", "--draw-only") == 0
    assert "nothing to draw" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_the_runs() -> None:
    """At most 60, each of its own name and config; in the grid a length of each delay + 1 is the first to reach it."""
    all_trials = trials()
    base = Config.load(CONFIG)
    assert len(all_trials) == len({trial.name for trial in all_trials}) <= 60
    configs = {trial: trial.config(base) for trial in all_trials}
    assert {delay + 1 for delay in DELAYS} == set(LENGTHS)
    for trial, config in configs.items():
        stored = trial.setting.way == STORED
        assert not stored or config.ppo.sequence_length == trial.setting.length
        assert config.env.options["delay"] == trial.setting.delay and config.seed == trial.seed
        assert config.core.kind == trial.setting.core
    of_ways = [configs[Trial(setting=way(name), seed=1)].to_toml() for name in WAYS]
    assert len(set(of_ways)) == len(WAYS) - 1  # the zeroed state is no setting


def way(name: str) -> Setting:
    return Setting(core=CORE, delay=DELAY, length=LENGTH, way=name)


def test_zeroed_states() -> None:
    """Updates see zeros in place of all stored states; what the agent remembers while it acts stays."""
    seen: list[Tensor] = []

    class Look(Callback):
        def before_epoch(self, iteration: Iteration, epoch: int) -> None:
            seen.append(iteration.rollout.state.rows.clone())

    losses = []
    for zeroed in (False, True):
        callbacks = [Look(), *([ZeroStates()] if zeroed else []), Look()]
        with Trainer(tiny(total_steps=64, ppo={"num_epochs": 1}), callbacks=callbacks) as trainer:
            (report,) = trainer
            assert trainer.carry.state.any()
            losses.append(report.scalars["loss/policy"])
    stored, same, before, after = seen
    assert stored.any() and torch.equal(stored, same) and torch.equal(stored, before)
    assert not after.any()
    assert losses[0] != losses[1]


def test_permutation_test_counts_all_ways_to_deal_the_runs() -> None:
    for a, b in [
        ([0.1, 0.5, 0.9], [0.2, 0.9]),
        ([1.0, 0.9, 0.8, 0.95], [0.3, 0.2, 0.4, 0.1]),
        ([0.5, 0.5], [0.5, 0.5]),
    ]:
        values, n = [*a, *b], len(a)
        at_least = at_most = total = 0
        for chosen in itertools.combinations(range(len(values)), n):
            rest = [values[i] for i in range(len(values)) if i not in chosen]
            difference = fmean([values[i] for i in chosen]) - fmean(rest) - (fmean(a) - fmean(b))
            total += 1
            at_least += difference > -1e-12
            at_most += difference < 1e-12
        assert permutation_p(a, b) == pytest.approx(min(1.0, 2 * min(at_least, at_most) / total))


def test_the_table_says_what_is_significant_and_what_is_not(tmp_path: Path) -> None:
    """Five runs apart: 2 / C(10, 5), times the six ways compared. Some runs are still missing."""
    success = {
        STORED: [0.3, 0.32, 0.34, 0.36, 0.38],
        "k1 = 4, k2 = 8": [0.9, 0.91, 0.92, 0.93, 1.0],
        "refresh every epoch": [0.31, 0.33, 0.35, 0.37, 0.9],
        "burn-in 4": [0.5],
    }
    for name, values in success.items():
        for seed, mean in enumerate(values, start=1):
            add_evaluation(tmp_path / Trial(setting=way(name), seed=seed).name, "final", 100, mean)
    add_evaluation(tmp_path / "lstm_delay15_length16_seed1", "final", 100, 0.75)
    outcomes = {outcome.setting: outcome for outcome in read_outcomes(tmp_path)}
    assert len(outcomes) == 5
    assert {name: verdict(outcomes[way(name)]) for name in success} == {
        STORED: "-",
        "k1 = 4, k2 = 8": f"yes (p = {2 / 252 * 6:.3f})",
        "refresh every epoch": "not shown (p = 1.000)",
        "burn-in 4": "too few runs to say",
    }
    text = results(list(outcomes.values())).markdown()
    assert "| lstm | 15 | 16 | stored state | 1 | 0.75 | 0.65 to 0.85 | - |" in text  # over levels
    assert "| gru | 7 | 4 | refresh every epoch | 5 | 0.45 |" in text
    assert "Bonferroni" in text
    drawn = draw(list(outcomes.values()))
    texts = {text.get_text() for axes in drawn.axes for text in axes.texts}
    assert texts == {"0.75", "0.34"}
