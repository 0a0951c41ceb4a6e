"""Files that lie in wait: whatever a checkpoint, a run's folder or an environment holds, nothing runs and one line says
what is wrong."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from helpers import refusal
from test_cli import POC, ROOT, SMALL

from ppo_tbptt.cli import main
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_tbptt.run.files import JsonError, read_json
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import MetricsError, read_metrics

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "run"
    assert main(["train", POC, "--run-dir", str(path), "--total-steps", "128", *SMALL]) == 0
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run, to be spoilt."""
    shutil.copytree(finished, tmp_path / "run")
    return RunDir(tmp_path / "run")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    return partial(refusal, capsys)


def contents(folder: Path) -> dict[str, bytes | str]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


# Checkpoints that would run something


class Malicious:
    """Unpickled, it runs a shell command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.target}'",)


MALICIOUS = {
    "torch.save, legacy": lambda path, tree: torch.save(tree, path, _use_new_zipfile_serialization=False),
    "save_checkpoint": save_checkpoint,
    "pickle": lambda path, tree: path.write_bytes(pickle.dumps(tree)),
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_no_checkpoint_runs_anything(kind: str, run: RunDir, tmp_path: Path, fails: Fails) -> None:
    target, newest = tmp_path / "was_here", run.checkpoint(2)
    tree = {**load_checkpoint(newest), "best": Malicious(target)}
    for path in [*run.periodic(), run.best]:
        path.unlink(missing_ok=True)
    MALICIOUS[kind](newest, tree)
    with pytest.raises(CheckpointError):
        Policy.load(newest)
    for arguments in (["evaluate", newest], ["evaluate", run.path], ["enjoy", newest], ["train", "--resume", run.path]):
        fails(*arguments)
    assert not target.exists()


# Metrics

ROW = b'{"iteration": 1, "env_steps": 64, "loss/total": 0.5}\n'
NO_ROWS = {
    "garbage": b"garbage",
    "blank": b"",
    "no iteration": b'{"env_steps": 64}',
    "iteration is true": b'{"iteration": true, "env_steps": 64}',
    "negative": b'{"iteration": 1, "env_steps": -1}',
    "text for a number": b'{"iteration": 1, "env_steps": 64, "loss/total": "low"}',
}


@pytest.mark.parametrize("line", NO_ROWS.values(), ids=NO_ROWS)
def test_metrics_that_are_no_rows(line: bytes, tmp_path: Path) -> None:
    """Before the last line they are an error; the last line may be torn."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROW + line + b"\n" + ROW)
    with pytest.raises(MetricsError) as caught:
        read_metrics(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < len(str(path)) + 200
    for last in (line, ROW[:-2]):
        path.write_bytes(ROW * 3 + last + b"\n")
        assert len(read_metrics(path)) == 3


def test_what_is_no_file_is_neither_read_to_its_end_nor_waited_for(tmp_path: Path) -> None:
    """100 GB of nothing, a pipe, a device."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 10**11)
    with pytest.raises(MetricsError, match="more than 1,048,576 bytes"):
        read_metrics(tmp_path / "large")
    with pytest.raises(JsonError, match="larger than 1,000 bytes"):
        read_json(tmp_path / "large", max_bytes=1000)
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe", "nowhere", "x" * 300, "/dev/zero"):
        with pytest.raises(MetricsError):
            read_metrics(tmp_path / name)
        with pytest.raises(JsonError):
            read_json(tmp_path / name)


def test_resume_says_what_is_wrong_with_the_metrics(run: RunDir, fails: Fails) -> None:
    run.metrics.write_bytes(ROW + b'{"iteration": [1]}\n' + ROW)
    before = contents(run.path / "checkpoints")
    assert f"{run.metrics}:2: " in fails("train", "--resume", run.path, "--total-steps", "256")
    assert contents(run.path / "checkpoints") == before


def test_metrics_behind_a_link_are_not_written(run: RunDir, tmp_path: Path, fails: Fails) -> None:
    run.metrics.unlink()
    run.metrics.symlink_to(tmp_path / "elsewhere")
    assert "is a link" in fails("train", "--resume", run.path, "--total-steps", "256")
    assert not (tmp_path / "elsewhere").exists()


# JSON and TOML

NO_JSON = {
    "empty": b"",
    "torn": b'{"a": 1',
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "NaN": b'{"a": NaN}',
    "1e400": b'{"a": 1e400}',
    "65 bits": b'{"a": 18446744073709551616}',
    "nested lists": b'{"a": ' + b"[" * 100_000,
    "half a character": b'{"a": "\\ud800"}',
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_json_that_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(JsonError) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert str(caught.value).isprintable() and len(str(caught.value)) < len(str(path)) + 200


def spoil(path: Path, *, key: str, value: Any) -> None:
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**tree, key: value}.items() if v is not ...}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("measures", ..., ": missing; must be"),
        ("env_id", None, ": none is not allowed; must be text"),
        ("repeats", True, ": true is not allowed; must be a whole number"),
        ("seeds", ["a"], ': ["a"] is not allowed; must be a list of at least 1, each a whole number'),
        ("measures", {"return": 3}, ".return: 3 is not allowed; must be a table {mean, ci95}"),
        (
            "measures",
            {"return": {"mean": 1}},
            ".return.ci95: missing; must be a list of at least 2 and at most 2, each a number, or none",
        ),
        ("headline", "fame", ': "fame" is not allowed; must be one of the measures'),
        ("forget_every", "never", "or none"),
        ("headline_without_memory", [0.5], ": [0.5] is not allowed; must be a number, or none"),
    ],
)
def test_a_spoilt_result_is_one_line(key: str, value: Any, says: str, run: RunDir, fails: Fails) -> None:
    final = run.evaluations / "final.json"
    spoil(final, key=key, value=value)
    for line in (fails("train", POC, "--run-dir", run.path, "--continue", *SMALL), fails("compare", run.path)):
        assert f"{final}: {key}" in line and says in line and "delete it, or move it elsewhere" in line


def test_names_are_printed_as_they_are(run: RunDir) -> None:
    """[/x] would be an error to rich and :smile: a picture; \\udcff is no text."""
    folder = run.path.rename(run.path.parent / "a:smile:\udcff")
    spoil(folder / "evaluations" / "final.json", key="env_id", value="[/x] [bold]y")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), POC, "--run-dir", str(folder), "--continue", *SMALL]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, capture_output=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"[/x] [bold]y after 128 steps" in done.stdout and b"a:smile:\\udcff" in done.stdout


# What a file says, and where a link leads, decides nothing outside of the run


def test_nothing_outside_of_the_run_is_touched(run: RunDir, tmp_path: Path, fails: Fails) -> None:
    """Results that name other files, and names in the config that look like paths."""
    (tmp_path / "x").write_text("mine")
    final = run.evaluations / "final.json"
    spoil(final, key="checkpoint", value="../../x")
    spoil(final, key="env_id", value="../../x")
    assert main(["train", POC, "--run-dir", str(run.path), "--continue", *SMALL]) == 0
    run.config.write_text(run.config.read_text().replace("ppo_tbptt/PocMemory-v0", "../../x"))
    fails("train", "--resume", run.path)
    path = run.newest()
    tree = load_checkpoint(path)
    save_checkpoint(path, {**tree, "config": {**tree["config"], "env": {**tree["config"]["env"], "id": "../../x"}}})
    fails("evaluate", path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "x"}
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.parametrize("name", ["thesis.tex", "checkpoints/bert.pt", "evaluations/notes.txt", "linked"])
def test_continue_deletes_nobody_elses_files(name: str, tmp_path: Path, fails: Fails) -> None:
    """A folder with a config.toml in it may be anyone's, and so may one that a link leads to."""
    run, mine = RunDir(tmp_path / "run"), tmp_path / "mine"
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".iteration_0000001.pt.123.tmp").write_text("half")
    run.config.write_text("seed = 1\n")
    if name == "linked":
        run.checkpoints.rename(mine)
        run.checkpoints.symlink_to(mine)
    else:
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).write_text("mine")
    before = contents(tmp_path)
    assert "exists already" in fails("train", POC, "--continue", "--run-dir", run.path, *SMALL)
    assert contents(tmp_path) == before


def test_retention_deletes_checkpoints_alone(run: RunDir, tmp_path: Path) -> None:
    strangers = ["iteration_best.pt", "iteration_1.pt", "iteration_0000001.pt.bak"]
    for name in strangers:
        (run.checkpoints / name).write_text("mine")
    (run.checkpoints / "iteration_9999999.pt").mkdir()
    (tmp_path / "outside.pt").write_text("mine")
    (run.checkpoints / "iteration_0000000.pt").symlink_to(tmp_path / "outside.pt")
    (run.checkpoints / "iteration_10000000.pt").write_bytes(run.newest().read_bytes())
    run.prune(1)
    assert [path.name for path in run.periodic()] == ["iteration_10000000.pt"]
    assert {path.name for path in run.checkpoints.iterdir()} >= {*strangers, "iteration_9999999.pt"}
    assert (tmp_path / "outside.pt").read_text() == "mine"


# Paths that are typed


COMMANDS = [["evaluate"], ["enjoy"], ["show"], ["train"], ["benchmark"], ["train", "--resume"]]
COMMANDS += [["benchmark", POC, "--profile"], ["evaluate", POC, "--json"], ["enjoy", POC, "--video"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_strange_paths(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path / "folder")
    before = contents(tmp_path)
    for name in ("pipe", "empty", "folder", "loop", "nowhere", "empty/below", "new\nline", "a\0b", "\udcff", "x" * 300):
        fails(*command, tmp_path / name)
    for path in ("", "/dev/zero", "/" + "y/" * 3000):
        fails(*command, path)
    assert contents(tmp_path) == before


def test_values_that_are_none(finished: Path, fails: Fails) -> None:
    for words in (["--json", "--"], ["--json=--"], ["--repeats", "--"]):
        assert "has no value" in fails("evaluate", finished, *words)
    for number in ("1e9", "10" * 3000, "-1", "", "½", "nan", str(2**31), "0x10"):
        for option in ("--num-seeds", "--first-seed", "--forget-every"):
            assert len(fails("evaluate", finished, option, number)) < 500


def test_a_device_is_not_replaced(fails: Fails, finished: Path) -> None:
    """As root /dev/null could be renamed away by a file that is to take its place."""
    assert "not a regular file" in fails("evaluate", finished, "--json", "/dev/null")
    assert Path("/dev/null").is_char_device()


# Environments


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("raise RuntimeError('two\\nlines')", "importing 'hostile' raised RuntimeError: two lines"),
        ("import sys; sys.exit(3)", "importing 'hostile' raised SystemExit: 3"),
        ("def", "importing 'hostile' raised SyntaxError"),
        ("print('x' * 100_000)", "unknown environment 'hostile:A-v0'"),
        ("import gymnasium; gymnasium.register('A-v0', lambda: {}['a\\nb'])", "its constructor raised KeyError"),
    ],
)
def test_environments_that_fail(
    text: str, says: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    (tmp_path / "hostile.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["train", POC, "--run-dir", tmp_path / "run", *SMALL[2:], "--env.id", "hostile:A-v0"]
    try:
        assert says in fails(*command, "--env.num-workers", workers)
    finally:
        sys.modules.pop("hostile", None)
        gymnasium.registry.pop("A-v0", None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ppo_tbptt/ProbeAction-v0", "fixture_envs:fixture/ImageToy-v0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_agent_meets_another_environment(env_id: str, finished: Path, fails: Fails) -> None:
    command = ["evaluate", finished, "--env.id", env_id, "--num-seeds", "2", "--num-workers", "0"]
    assert "don't fit this agent" in fails(*command)
