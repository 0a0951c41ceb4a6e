"""Agents in the package and those that a user makes of a run, and configs by name, from any folder."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from configs_for_tests import tiny
from helpers import refusal, train_tiny
from runs_for_tests import add_evaluation

from ppo_tbptt import Policy
from ppo_tbptt.analysis.runs import read_run
from ppo_tbptt.cli import main
from ppo_tbptt.commands.export_agent import origin
from ppo_tbptt.commands.parser import split_overrides
from ppo_tbptt.config import Config
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.run.agents import AGENTS, packaged_agents
from ppo_tbptt.run.files import replacing_folder

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.name for path in AGENTS.iterdir())
SHIPPED = sorted((ROOT / "configs").rglob("*.toml"))
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 100}


def path_to(folder: Path) -> dict[str, str]:
    """The environment of a process that imports the package from ``folder``."""
    return {**os.environ, "PYTHONPATH": str(folder)}


# --- the agents of the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_agent_is_whole_and_its_command_is_that_of_its_config(name: str) -> None:
    agent = packaged_agents()[name]
    card = agent.read_card()
    assert {path.name for path in agent.path.iterdir()} == {path.name for path in agent.files}
    assert agent.weights.stat().st_size < 8e6
    assert agent.episode.stat().st_size < 2e6
    assert card.name == name and card.machine and card.hours > 0
    assert (card.levels.first_seed, card.levels.num_seeds, card.levels.repeats) == (200_000, 50, 3)
    assert card.result.ci95 is not None and card.wiped is not None and card.wiped.mean < card.result.ci95[0]
    policy = Policy.load(name)
    assert policy.config == Config.load(agent.config)
    assert (policy.env_steps, policy.config.env.options, policy.spec.headline) == (
        card.env_steps,
        card.options,
        card.headline,
    )
    assert origin(policy.config, card.ranks) == (card.config, card.command)
    assert card.config is not None, "trained with a config of the package"
    assert any(point.held_out == pytest.approx(card.result.mean, abs=1e-5) for point in agent.read_curve())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_agent_plays_as_its_card_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    policy, card = Policy.load(name), packaged_agents()[name].read_card()
    played = evaluate(policy.agent, policy.config.env, seeds=range(200_000, 200_020), repeats=1, num_workers=0)
    assert card.result.ci95 is not None
    low, high = card.result.ci95
    # Below the card's interval by what 20 levels vary more than its 50: twice their standard error, from its width.
    error = (high - low) / (2 * 1.96) * math.sqrt(card.levels.num_seeds / 20)
    assert played.measures[card.headline].mean >= low - 2 * error


def test_the_wheel_stays_small() -> None:
    """Even unpacked it is under the 40 MB that it may have."""
    files = [path for folder in ("ppo_tbptt", "configs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.suffix != ".pyc") < 40e6


def test_agents_are_listed_without_torch(tmp_path: Path) -> None:
    code = "import sys; from ppo_tbptt.cli import main; code = main(sys.argv[1:]); assert not code, code"
    code += "; assert 'torch' not in sys.modules"
    for argv in (["agents"], ["agents", NAMES[0]], ["agents", "--json"]):
        done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, env=path_to(ROOT), **CAPTURED)
        assert done.returncode == 0, done.stderr
        assert NAMES[0] in done.stdout
    assert [tree["name"] for tree in json.loads(done.stdout)] == NAMES


def test_what_is_done_with_a_name_is_written_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in AGENTS.rglob("*")}
    assert main(["evaluate", "quickstart", "--num-seeds", "2", "--repeats", "1", "--num-workers", "0"]) == 0
    assert main(["probe", "quickstart", "--num-seeds", "2", "--repeats", "1", "--num-workers", "0"]) == 0
    assert main(["plot", "quickstart", "--out", "curve.svg"]) == 0
    assert main(["export", "quickstart", "--safetensors", "quickstart.safetensors"]) == 0
    name = "quickstart_levels200000-200001x1_sampling0"
    written = {f"{name}.json", f"probe_{name}.json", f"probe_{name}.png", "curve.svg", "quickstart.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == written
    assert f"written to {name}.json" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in AGENTS.rglob("*")} == before


def test_an_existing_path_wins_over_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    train_tiny(tmp_path / "quickstart", total_steps=64)
    assert Policy.load("quickstart").env_steps == 64
    assert Policy.load("quickstart").path == Path("quickstart/checkpoints/iteration_0000001.pt")
    assert read_run(Path("quickstart")).env_steps == 64
    (tmp_path / "quickstart.toml").write_text(tiny(seed=9).to_toml())
    (tmp_path / "toy_truncate").write_text(tiny(seed=8).to_toml())
    assert Config.load("quickstart").env.id == "MortarMayhem-Grid-v0", "a folder is no config"
    assert Config.load("quickstart.toml").seed == 9
    assert Config.load("toy_truncate").seed == 8
    assert main(["show", "quickstart"]) == 0
    assert "PocMemory" in capsys.readouterr().out, "of the run, as for other commands"


def test_a_wrong_name_says_which_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["evaluate"], ["enjoy"], ["probe"], ["export", "--onnx", tmp_path / "a.onnx"]):
        assert "did you mean the agent quickstart?" in refusal(capsys, *command, "quickstrat")
    assert f"the package has {', '.join(NAMES)}" in refusal(capsys, "evaluate", "nothing_alike")
    assert "did you mean the agent quickstart?" in refusal(capsys, "plot", "quickstrat", "--out", tmp_path / "a.png")
    assert "did you mean the agent quickstart?" in refusal(capsys, "agents", "quickstrat")
    assert "one checkpoint" in refusal(capsys, "evaluate", "quickstart", "--all")
    assert "nearest are cpu/mortar_mayhem_grid" in refusal(capsys, "train", "cpu/mortar_maihem_grid")
    assert "nearest are quickstart" in refusal(capsys, "show", "quickstrat")


# --- agents of one's own --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that chose its best checkpoint on levels of its own; the newest is another."""
    train: dict[str, Any] = {"eval_every": 1, "eval_first_seed": 300_000, "checkpoint_every": 1}
    return train_tiny(tmp_path_factory.mktemp("agents") / "run", total_steps=512, train=train)


def test_a_runs_agent_is_taken_wherever_a_run_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    export = ["export", str(run), "--agent", "mine", "--out", "agents", "--machine", "a pocket calculator"]
    best = Policy.load(run / "checkpoints" / "best.pt")
    # Neither an older best checkpoint's result nor one by another protocol is taken for this one's.
    add_evaluation(run, "best_levels200000-200049x3_sampling0", 448, 1.0)
    add_evaluation(run, "final", best.env_steps, 1.0, max_steps=9)
    assert main(export) == 0
    (run / "evaluations" / "final.json").unlink()
    assert {path.name for path in Path("agents").iterdir()} == {"mine"}
    assert main(["agents", "agents/mine", "--json"]) == 0
    out = capsys.readouterr().out
    card = json.loads(out[out.index("\n{") :])
    agent = Policy.load("agents/mine")
    for key, tensor in best.agent.state_dict().items():
        assert agent.agent.state_dict()[key].equal(tensor)
    assert agent.config == best.config
    assert card["env_steps"] == best.env_steps < 512, "the test needs a best that is not the last"
    assert card["chosen"] == "best of the run on level seeds 300000 to 300003"
    assert (card["machine"], card["name"], card["config"]) == ("a pocket calculator", "mine", "toy_poc_memory")
    how: dict[str, Any] = {"seeds": range(200_000, 200_050), "repeats": 3, "num_workers": 0}
    for key, forget_every in (("result", None), ("wiped", 1)):
        played = evaluate(best.agent, best.config.env, forget_every=forget_every, **how).measures["success"]
        assert (card[key]["mean"], tuple(card[key]["ci95"])) == (played.mean, played.ci95)

    of_agent, of_run = read_run(Path("agents/mine")), read_run(run)
    assert [point.env_steps for point in of_agent.held_out] == [point.env_steps for point in of_run.held_out]
    assert [point.mean for point in of_agent.held_out] == pytest.approx(
        [point.mean for point in of_run.held_out], rel=1e-5
    )
    assert [point.mean for point in of_agent.training] == pytest.approx([p.mean for p in of_run.training], rel=1e-5)
    assert (of_agent.config, of_agent.env_steps) == (of_run.config, 512)
    assert of_agent.hours == pytest.approx(of_run.hours, rel=1e-5)
    at_best = next(point.hours for point in of_run.held_out if point.env_steps == best.env_steps)
    assert card["hours"] == pytest.approx(at_best, abs=1e-6)

    for command in (["evaluate", "--num-seeds", "2"], ["export", "--safetensors", "a.safetensors"], ["show"]):
        assert main([*command, "agents/mine"]) == 0
    assert main(["compare", "agents/mine", str(run)]) == 0
    assert main(["enjoy", "agents/mine", "--video", "a.gif"]) == 0
    capsys.readouterr()
    assert main(export) == 0, "again, with what is evaluated already"
    assert capsys.readouterr().out.count("evaluated already") == 2


def test_the_command_of_a_card_trains_with_the_config_of_the_run() -> None:
    for file in SHIPPED:
        name = file.relative_to(ROOT / "configs").with_suffix("").as_posix()
        config = Config.load(file).replace(device="cpu", train={"keep_checkpoints": 9}, env={"num_workers": 3})
        assert origin(config if config.precision != "auto" else config.replace(precision="float32")) == (
            name,
            f"ppo-tbptt train {name}",
        )
    changed = Config.load("quickstart").replace(
        seed=3,
        precision="bfloat16",
        core={"kind": "lstm", "hidden_size": 64},
        ppo={"learning_rate": 1e-4, "clip_range": {"initial": 0.2, "final": 0.1}, "sequence_length": 16},
        env={"options": {"command_count": [1, 2], "explosion_delay": None}},
    )
    name, command = origin(changed)
    words = shlex.split(command)
    assert (name, words[:3]) == ("quickstart", ["ppo-tbptt", "train", "quickstart"])
    assert Config.load("quickstart", split_overrides(words[3:], {})[1]) == changed
    assert origin(changed, ranks=4)[1].startswith("torchrun --nproc-per-node 4 -m ppo_tbptt train quickstart --seed 3")
    assert origin(changed.replace(env={"id": "my:Own-v0"})) == (None, "ppo-tbptt train config.toml")


def test_what_can_be_no_agent_is_refused_before_it_is_evaluated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    seen = train_tiny(tmp_path / "seen", total_steps=64, env={"num_seeds": 200_001}, train={"eval_first_seed": 900_000})
    for argv, text in (
        ([run, "--agent", "mine"], "diary.txt"),
        ([run, "--agent", "../mine"], "must be a name"),
        ([run, "--agent", "a", "--onnx", "a.onnx"], "--onnx"),
        ([run, "--onnx", "a.onnx", "--out", "a"], "only with --agent"),
        ([run, "--agent", "a", "--out", run / "config.toml"], "must be a folder"),
        (["quickstart", "--agent", "a"], "no run"),
        ([run, "--agent", "a", "--without-memory", run], "has a memory"),
        ([seen, "--agent", "a"], "0 to 200000, so that 200000 to 200049 are not held out"),
    ):
        assert text in refusal(capsys, "export", *argv)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "seen"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "a") as folder:
        (folder / "old").touch()

    def fail() -> None:
        with replacing_folder(tmp_path / "a") as folder:
            (folder / "new").touch()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/old"]
    with replacing_folder(tmp_path / "a") as folder:
        (folder / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["a", "a/new"]


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("card.json", "{", "card.json: not valid JSON"),
        ("card.json", "{}", "card.json: name: missing; must be text"),
        ("curve.csv", "env_steps,hours\n1,2\n", "curve.csv:2: not a point"),
        ("curve.csv", "env_steps,hours,training,held_out,low,high\n1,nan,,,,\n", "curve.csv:2: not a point"),
        ("weights.safetensors", "", "weights.safetensors: not a safetensors file"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(
    file: str, content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(AGENTS / "quickstart", tmp_path / "a")
    (tmp_path / "a" / file).write_text(content)
    command = ["evaluate"] if file.startswith("weights") else ["plot", "--out", tmp_path / "a.png"]
    assert text in refusal(capsys, *command, tmp_path / "a")


# --- configs by name ------------------------------------------------------------------------------------------------


def test_an_installed_package_finds_its_configs_from_any_folder(tmp_path: Path) -> None:
    """The wheel is laid out as pyproject.toml says."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    ignore = shutil.ignore_patterns("__pycache__", "agents")
    for source, target in {**{name: name for name in wheel["packages"]}, **wheel["force-include"]}.items():
        shutil.copytree(ROOT / source, tmp_path / "site" / target, ignore=ignore)
    code = "from ppo_tbptt.config.shipped import *; from ppo_tbptt.config import Config; import json;"
    code += "print(json.dumps({name: Config.load(name).to_dict() for name in config_names()}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=path_to(tmp_path / "site"), **CAPTURED)
    assert done.returncode == 0, done.stderr
    files = {path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path for path in SHIPPED}
    assert json.loads(done.stdout) == {name: Config.load(path).to_dict() for name, path in files.items()}
    assert {"quickstart", "cpu/mortar_mayhem_grid"} < files.keys()


def test_a_checkout_finds_its_configs_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "cpu/mortar_mayhem_grid", "--seed", "7"]) == 0
    assert "seed = 7" in capsys.readouterr().out
    assert "did you mean the package's config quickstart?" in refusal(capsys, "train", "configs/quickstart.toml")
    assert "--ppo.gama" in refusal(capsys, "train", "quickstart", "--ppo.gama", "1")
