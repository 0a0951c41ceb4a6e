"""``compare``, ``plot`` and ``evaluate --all`` as a person types them."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from configs_for_tests import tiny
from helpers import refusal, train_tiny
from runs_for_tests import add_evaluation, make_run

from ppo_tbptt.analysis.figures import learning_curves
from ppo_tbptt.analysis.groups import by_task, group_runs
from ppo_tbptt.analysis.runs import read_run
from ppo_tbptt.cli import main
from ppo_tbptt.config import Config

ROOT = Path(__file__).parent.parent
LONG = "a_run_whose_name_somebody_typed_in_a_hurry_with_all_of_its_settings_in_it_and_then_some_more_of_them"


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """Two runs of one config, one of another with a long name, and one of another task without a held-out result."""
    lstm = tiny(core={"kind": "lstm"})
    other = tiny(env={"options": {"num_show_steps": 2}})
    paths = [make_run(tmp_path / f"gru{s}", {10: 0.4, 20: 0.5 + s / 10}, tiny(seed=s)) for s in (1, 2)]
    paths.append(make_run(tmp_path / LONG, {10: 0.9, 20: 0.995}, lstm))
    add_evaluation(paths[-1], "final", 2000, 0.98)
    paths.append(make_run(tmp_path / "other", {1: 0.1}, other))
    (paths[-1] / "metrics.jsonl").write_text('{"iteration": 1, "env_steps": 100}\n')
    return [str(path) for path in paths]


def test_compare(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--json", str(tmp_path / "all.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    for text in ("gru*", "0.650 [0.600, 0.700]", "0.980 [0.880, 1.080]", "core.kind", "gru: A, C; lstm: B"):
        assert any(text in line for line in lines), text
    assert any("1k, 0.11 h" in line for line in lines)  # lstm reaches 50 % and 90 % after 10 iterations
    assert any("other has no held-out result yet" in line for line in lines)
    assert all(len(line) <= 100 for line in lines if not line.startswith(("written to", str(tmp_path))))

    tree = json.loads((tmp_path / "all.json").read_text())
    first, second, third = tree["groups"]
    assert first["last"]["mean"] == pytest.approx(0.65)
    assert first["last"]["interval_over"] == "runs"
    assert [run["seed"] for run in first["runs"]] == [1, 2]
    half = {"fraction": 0.5, "value": 0.5, "env_steps": 2000, "hours": 0.22, "at_the_latest": False, "runs": 2}
    assert first["reach"][0] == half
    ci95 = pytest.approx([0.88, 1.08])
    assert second["last"] == {"mean": 0.98, "ci95": ci95, "interval_over": "level seeds", "iqm": None, "runs": 1}
    assert third["last"] is None
    assert tree["differences"]["core.kind"] == {"A": "gru", "B": "lstm", "C": "gru"}


def test_wrong_input_is_one_line(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text(tiny().to_toml())
    (tmp_path / "folder.png").mkdir()
    for arguments, text in {
        ("compare", runs[0], str(tmp_path / "empty")): "no such metrics file",
        ("compare", runs[0], runs[0] + "/."): "named twice",
        ("compare", runs[0], "--json", "nowhere/a.json"): "there is no folder nowhere",
        ("plot", runs[0], "--out", str(tmp_path / "folder.png")): "is a folder",
        ("evaluate", runs[0], "--all"): "no checkpoint",
    }.items():
        assert text in refusal(capsys, *arguments)


def test_plot_writes_what_its_name_says(runs: list[str], tmp_path: Path) -> None:
    for kind, magic in {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}.items():
        assert main(["plot", *runs, "--out", str(tmp_path / f"a.{kind}")]) == 0
        assert (tmp_path / f"a.{kind}").read_bytes().startswith(magic)
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".pdf", ".png", ".svg"]


def shown(*paths: str | Path) -> tuple[list[str], str]:
    """Everything in the legends of a figure, and how its axis of steps is scaled."""
    figure = learning_curves(by_task(group_runs([read_run(Path(path)) for path in paths])))
    labels = [text.get_text() for row in figure.subfigs for legend in row.legends for text in legend.get_texts()]
    return labels, figure.axes[0].get_xscale()


def test_published_curves_are_drawn_behind_their_own_task_alone(tmp_path: Path) -> None:
    published = Config.load(ROOT / "configs" / "mortar_mayhem_grid.toml")
    easier = published.override({"env.options.command_count": "[1]"})
    figures = {"eval/commands_completed": 0.1, "episode/commands_completed": 0.1}
    ours = make_run(tmp_path / "ours", {5: 0.1}, published, **figures)
    labels, scale = shown(ours)
    assert labels == ["ours (gru)", *(f"published {x}" for x in ("GRU", "PPO without memory", "Transformer-XL"))]
    assert scale == "log"  # 500 steps beside 164 million
    labels, scale = shown(make_run(tmp_path / "easier", {5: 0.1}, easier, **figures))
    assert (labels, scale) == (["easier (gru)"], "linear")


def test_training_episodes_only_where_there_is_nothing_held_out(runs: list[str], tmp_path: Path) -> None:
    assert shown(*runs[:2])[0] == ["gru* (gru, 2 runs)"]
    once = make_run(tmp_path / "once", {20: 0.5})
    assert shown(once)[0] == ["once (gru): training episodes", "once (gru)"]
    at_the_end = make_run(tmp_path / "end", {18: 0.4, 20: 0.5})  # as of the checkpoints that were kept
    assert shown(at_the_end)[0] == ["end (gru): training episodes", "end (gru)"]


def evaluate_all(run: Path, *arguments: str) -> dict[str, int]:
    """Steps by the names of the files that there are then, and whether they were written now."""
    files = {path.name: path.stat().st_mtime_ns for path in (run / "evaluations").glob("*.json")}
    assert main(["evaluate", str(run), "--all", "--num-seeds", "3", "--num-workers", "0", *arguments]) == 0
    return {
        path.name.split("_levels")[0]: json.loads(path.read_text())["env_steps"]
        for path in (run / "evaluations").glob("*.json")
        if files.get(path.name) != path.stat().st_mtime_ns
    }


def test_all_checkpoints_are_evaluated_once_and_as_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are from after iterations 2 and 4, and the best one from after iteration 4."""
    trained = train_tiny(tmp_path / "run", train={"eval_every": 4})
    steps = {"iteration_0000002": 128, "iteration_0000004": 256, "best": 256}
    assert evaluate_all(trained, "--json", str(tmp_path / "all.json")) == steps
    out = capsys.readouterr().out
    assert "128  " in out and "success" in out and "best.pt" in out
    trees = json.loads((tmp_path / "all.json").read_text())
    assert [tree["env_steps"] for tree in trees] == [128, 256, 256]
    assert [Path(tree["checkpoint"]).name for tree in trees][2] == "best.pt"
    assert trees[1]["per_episode"] == trees[2]["per_episode"]

    assert evaluate_all(trained) == {}
    assert capsys.readouterr().out.count("evaluated already") == 3
    one, checkpoint = tmp_path / "one.json", trained / "checkpoints" / "iteration_0000002.pt"
    assert main(["evaluate", str(checkpoint), "--num-seeds", "3", "--num-workers", "0", "--json", str(one)]) == 0
    assert json.loads(one.read_text()) == trees[0]
    (trained / "checkpoints" / "best.pt").write_bytes((trained / "checkpoints" / "iteration_0000002.pt").read_bytes())
    assert evaluate_all(trained) == {"best": 128}  # a newer best.pt: its old result is stale
    assert evaluate_all(trained, "--max-steps", "5").keys() == steps.keys()
    broken = next((trained / "evaluations").glob("iteration_0000002*"))
    broken.write_text("{")
    assert evaluate_all(trained, "--max-steps", "5") == {"iteration_0000002": 128}
    files = list((trained / "evaluations").iterdir())
    assert len(files) == 3

    assert evaluate_all(trained, "--env.options.num-show-steps", "2") == {}  # another task: not among the run's results
    assert list((trained / "evaluations").iterdir()) == files
    assert capsys.readouterr().out.count("256  ") >= 1
