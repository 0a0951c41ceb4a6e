"""The comparison of cores: how rates are chosen, what is of equal size, and what its tables and figure tell."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from configs_for_tests import tiny
from helpers import refusal
from runs_for_tests import add_evaluation, make_run

from ppo_tbptt.analysis.core_study import Cores, CoreSizes, CoresOnMemoryGym
from ppo_tbptt.analysis.core_trials import RATES, TOYS, Trial
from ppo_tbptt.analysis.study import Results
from ppo_tbptt.cli import main
from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.statistics import least_stratified_p, permutation_p, stratified_permutation_p
from ppo_tbptt.models.cores import CORES
from ppo_tbptt.types import AgentOutput, Minibatch

SMALL = ["--jobs", "0", "--device", "cpu", "--env.num-envs", "4", "--ppo.rollout-steps", "16", "--total-steps", "192"]
SMALL += ["--ppo.num-minibatches", "2", "--train.eval-num-seeds", "4"]
ONLY = ["--only", "recall_ordered_rnn_tanh_items2"]
RESULTS = [f"recall_ordered_rnn_tanh_items2_seed{seed}" for seed in (1, 2, 3)]
SEARCH = [f"recall_ordered_rnn_tanh_items4_rate{rate}" for rate in ("0.33", "1", "3")]


def compare(folder: Path, *options: str) -> int:
    return main(["ablate", "cores", "--out", str(folder), *SMALL, *options])


def final(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "evaluations" / "final.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one core at one length, and those that they need."""
    folder = tmp_path_factory.mktemp("cores") / "runs"
    assert compare(folder, *ONLY) == 0
    return folder


def test_the_best_rate_of_the_search_is_that_of_the_results(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir() if path.is_dir()) == sorted([*SEARCH, *RESULTS])
    scores = {name: final(finished, name)["measures"]["recalled"]["mean"] for name in SEARCH}
    configs = {name: Config.load(finished / name / "config.toml") for name in [*SEARCH, *RESULTS]}
    rates = {configs[name].ppo.learning_rate.initial: score for name, score in scores.items()}
    assert sorted(rates) == pytest.approx([5e-3 / 3, 5e-3, 5e-3 * 3])
    for name in RESULTS:
        rate = configs[name].ppo.learning_rate
        assert rates[rate.initial] == max(rates.values()) and rate.final == 0
        assert configs[name].core == configs[SEARCH[0]].core
        seeds = [set(final(finished, run)["seeds"]) for run in (name, SEARCH[0])]
        assert not seeds[0] & seeds[1]
    (row,) = json.loads((finished / "ablation.json").read_text())
    assert (row["task"], row["core"], row["env_steps"]) == ("recall_ordered", "rnn_tanh", 192)
    assert sorted(row["search"].values()) == sorted(scores.values())
    (length,) = row["lengths"]
    means = [final(finished, name)["measures"]["recalled"]["mean"] for name in RESULTS]
    assert (length["length"], length["score"]) == (2, fmean(means))
    assert [run["mean"] for run in length["by_seed"].values()] == means
    assert all(run["seconds"] > 0 for run in length["by_seed"].values())
    assert "ordered recall, 192 steps" in (finished / "ablation.md").read_text()
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_run_again_and_a_lost_one_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / RESULTS[1] / "evaluations" / "final.json").unlink()
    assert compare(finished, *ONLY) == 0
    out = capsys.readouterr().out
    assert f"{RESULTS[1]}: recalled" in out and "6 runs, 5 of them finished before" in out
    assert f"{RESULTS[0]}: recalled" not in out


def test_what_a_failed_search_decides_is_not_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / SEARCH[1]).mkdir()
    (tmp_path / SEARCH[1] / "mine").write_text("kept")
    assert compare(tmp_path, *ONLY) == 1
    captured = capsys.readouterr()
    assert SEARCH[1] in captured.err and f"3 runs were not begun, such as {RESULTS[0]}" in captured.out
    assert {path.name for path in tmp_path.iterdir()} == set(SEARCH)


def not_a_number(batch: Minibatch, output: AgentOutput) -> tuple[Any, dict[str, Any]]:
    """A loss that no weights survive."""
    return output.value.sum() * float("nan"), {}


def test_a_run_that_diverges_counts_with_its_last_finite_weights(tmp_path: Path) -> None:
    losses = ["--losses", '{"test_core_study:not_a_number" = 1.0}', "--train.max-nonfinite-updates", "1"]
    assert compare(tmp_path, "--only", "recall_ordered_none_items2", *losses) == 0
    tree = final(tmp_path, "recall_ordered_none_items2_seed1")
    assert tree["env_steps"] == 0 and "NaN" in tree["diverged"]
    assert "1 diverged" in (tmp_path / "ablation.md").read_text()


@pytest.mark.parametrize("key", ["--core.kind=lstm", "--seed=3", "--env.options.items=3"])
def test_what_the_runs_differ_in_cannot_be_set(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "ablate", "cores", "--out", tmp_path / "runs", *SMALL, key)
    assert key[2:].partition("=")[0] in error and "leave it out" in error
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("study", [Cores, CoresOnMemoryGym])
def test_the_runs(study: type[Cores], tmp_path: Path) -> None:
    """Every core is tuned alike. No two results on a task, and no search, share a seed; one floor at each length.

    No task's name is part of another's.
    """
    all_trials = study.trials()
    assert len({trial.name for trial in all_trials}) == len(all_trials)
    assert {trial.core for trial in all_trials} == set(CORES)
    assert all(a is b or a.name not in b.name for a in study.tasks for b in study.tasks)
    for task, core in itertools.product(study.tasks, CORES):
        of = [trial for trial in all_trials if trial.task is task and trial.core == core]
        rates = [trial.rate for trial in of if trial.rate is not None]
        assert rates == ([] if core == "none" else list(RATES))
        seeds = [trial.seed for trial in of if trial.rate is None]
        runs = 1 if core == "none" else len(task.seeds)
        assert len(seeds) == len(set(seeds)) == runs * max(1, len(task.lengths))
        assert not {trial.seed for trial in of if trial.rate is not None} & set(seeds)
    search = [trial for trial in all_trials if trial.core == "lstm" and trial.rate is not None]
    small = study(None, {"core.hidden_size": "16", "model.cnn_channels": "[2, 2, 2]"})  # overrides are for all runs
    configs = {trial: small.config(trial, tmp_path) for trial in search}
    for trial, config in configs.items():
        base = small.bases[trial.task]
        assert trial.rate is not None
        assert config.ppo.learning_rate.initial == base.ppo.learning_rate.initial * trial.rate
        assert config.ppo.learning_rate.final == (base.ppo.learning_rate.final or 0) * trial.rate
        assert config.model.cnn_channels == (2, 2, 2)
        assert config.train.eval_first_seed == 300_000 != base.train.eval_first_seed
        if trial.length is not None:
            assert config.env.options[trial.task.label] == trial.length
    assert len({config.to_toml() for config in configs.values()}) == len(search)


@pytest.mark.parametrize("task", TOYS, ids=lambda task: task.name)
def test_cores_are_of_equal_size(task: Any) -> None:
    """The GRU by hand; the others as near to it as a multiple of 8 goes."""
    base = Config.load(task.config)
    sizes = CoreSizes(base)
    wanted = sizes.parameters(base)
    assert wanted == 3 * (32 * 32 + 32 * 32 + 2 * 32)
    assert sizes.matched("gru") == 32
    for kind in CORES:
        if kind != "none":
            size = sizes.matched(kind)
            around = [sizes.parameters(base.replace(core={"kind": kind, "hidden_size": n})) for n in (size, size + 8)]
            around += [sizes.parameters(base.replace(core={"kind": kind, "hidden_size": max(8, size - 8)}))]
            assert min(around, key=lambda number: abs(number - wanted)) == around[0]
            assert 0.6 < around[0] / wanted < 1.6, kind


def add_run(folder: Path, trial: Trial, mean: float, config: Config | None = None) -> None:
    """A finished run; it took 72 seconds."""
    run = make_run(folder / trial.name, {1: mean}, config or tiny(core={"kind": trial.core, "hidden_size": 8}))
    add_evaluation(run, "final", 100, mean)


def shown(folder: Path, scores: dict[str, Iterable[float]]) -> Results:
    """What runs show whose seeds have these scores, the same at all lengths of one toy."""
    study = Cores(None, {})
    for trial in study.trials():
        if trial.task is TOYS[1] and trial.rate is None and trial.core in scores:
            number = trial.seed % 10 - 1
            if number < len(of := list(scores[trial.core])):
                add_run(folder, trial, of[number])
    results = study.results(folder)
    assert results is not None
    return results


def test_the_table_says_what_is_better_than_gru(tmp_path: Path) -> None:
    """Three runs at each of three lengths, all apart: 2 / C(6, 3)^3, times all cores compared on all tasks."""
    results = shown(
        tmp_path, {"gru": [0.5, 0.6, 0.7], "lstm": [0.8, 0.9, 1.0], "rnn_relu": [0.4, 0.8, 0.6], "none": [0.25]}
    )
    ((title, (head, *rows)),) = results.tables.items()
    cells = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    comparisons = 3 * (len(CORES) - 2)
    assert title == "ordered recall, 100 steps; 0.25 by chance"
    assert [cells[core]["than gru"] for core in cells] == [
        "-",
        "not shown",
        "-",
        f"better, p = {2 / 8000 * comparisons:.3f}",
    ]
    assert cells["gru"]["items 4"] == "0.60 (0.50 to 0.70)"
    assert cells["none"]["items 8"] == "0.25 (0.15 to 0.35)"  # over levels
    assert cells["lstm"]["minutes"] == "1.2"
    assert f"times {comparisons} comparisons (Bonferroni)" in results.markdown()


def test_few_runs_are_said_to_be_few(tmp_path: Path) -> None:
    results = shown(tmp_path, {"gru": [0.1], "lstm": [1.0], "rnn_tanh": [1.0, 1.0]})
    assert "0.05" not in results.markdown() and results.markdown().count("too few runs") == 2


def test_worse_than_gru(tmp_path: Path) -> None:
    results = shown(tmp_path, {"gru": [0.9, 0.95, 1.0], "lstm": [0.3, 0.25, 0.2]})
    assert "worse, p = " in results.markdown() and "better" not in results.markdown()


def test_the_figure_has_a_panel_for_each_task_and_a_line_for_each_core(tmp_path: Path) -> None:
    shown(tmp_path, {"gru": [0.5, 0.6, 0.7], "lstm": [0.8, 0.9, 1.0]})
    for trial in Cores.trials():
        if trial.task is TOYS[0] and trial.core == "none":
            add_run(tmp_path, trial, 0.25)
    study = Cores(None, {})
    results = study.results(tmp_path)
    assert results is not None
    first, second = results.figure.axes
    assert (first.get_title("left"), second.get_title("left")) == ("delayed choice", "ordered recall")
    assert [label.get_text() for label in second.get_xticklabels()] == ["2", "4", "8"]
    lines = {str(line.get_label()): line for line in second.get_lines()}
    assert np.asarray(lines["lstm"].get_ydata()) == pytest.approx([0.9, 0.9, 0.9])
    (legend,) = results.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["none", "gru", "lstm"]


def test_on_memory_gym_learning_is_drawn_over_steps_and_time(tmp_path: Path) -> None:
    study = CoresOnMemoryGym(None, {})
    for trial in study.trials():
        if trial.core in ("gru", "lstm") and trial.rate is None:
            base = study.bases[trial.task].replace(core={"kind": trial.core}, seed=trial.seed)
            add_run(tmp_path, trial, 0.5, base)
            for file in (tmp_path / trial.name).rglob("*.json*"):
                file.write_text(file.read_text().replace("success", "commands_completed"))
    results = study.results(tmp_path)
    assert results is not None
    assert [axes.get_xlabel().partition(" of")[0] for axes in results.figure.axes[:2]] == [
        "environment steps",
        "minutes",
    ]
    assert list(results.tables) == [f"{task.title}, 100 steps" for task in study.tasks]
    assert results.markdown().count("too few runs") == 2


def test_permutation_test_over_strata_counts_all_ways_to_deal_the_runs() -> None:
    for strata in (
        [([0.1, 0.5, 0.9], [0.2, 0.9]), ([0.3, 0.4], [0.35, 0.1])],
        [([1.0, 0.9], [0.3, 0.2]), ([0.5], [0.4]), ([0.7, 0.7], [0.1, 0.2])],
    ):
        of_each = []
        for a, b in strata:
            values, n = [*a, *b], len(a)
            deals = itertools.combinations(range(len(values)), n)
            rest = lambda chosen, values=values: [values[i] for i in range(len(values)) if i not in chosen]  # noqa: E731
            of_each.append([fmean([values[i] for i in chosen]) - fmean(rest(chosen)) for chosen in deals])
        seen = sum(fmean(a) - fmean(b) for a, b in strata)
        sums = [sum(deal) for deal in itertools.product(*of_each)]
        one_sided = min(sum(x > seen - 1e-12 for x in sums), sum(x < seen + 1e-12 for x in sums)) / len(sums)
        assert stratified_permutation_p(strata) == pytest.approx(min(1.0, 2 * one_sided))
        assert least_stratified_p(strata) == min(1.0, 2 / len(sums))
    one = ([0.1, 0.5, 0.9, 0.7], [0.2, 0.9, 1.0, 1.0])
    assert stratified_permutation_p([one]) == pytest.approx(permutation_p(*one))
    many = [([0.1 * i for i in range(8)], [0.1 * i + 0.35 for i in range(8)])] * 3
    exact = stratified_permutation_p(many[:1])
    assert 0 < stratified_permutation_p(many) < exact  # drawn, not counted
