"""Files that lie in wait: whatever a checkpoint, a run's folder or an environment holds, nothing runs and one line says
what is wrong."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ppo_tbptt.cli import main
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_tbptt.run.files import JsonError, read_json
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import MetricsError, read_metrics

ROOT = Path(__file__).parent.parent
POC = str(ROOT / "configs" / "toy_poc_memory.toml")
SMALL = ["--env.num-workers", "0", "--env.num-envs", "4", "--ppo.rollout-steps", "16", "--ppo.num-minibatches", "2"]
SMALL += ["--ppo.sequence-length=8", "--train.eval-num-seeds", "3", "--train.eval-repeats=1", "--device", "cpu"]
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
    """Run a command that must end with exit code 2 and one line, which is returned."""

    def run_it(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        assert captured.err.strip().isprintable()
        return captured.err

    return run_it


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


def behind_a_real_one(real: Path, pickled: bytes, path: Path) -> None:
    """A checkpoint of ours, whole but for the data.pkl in it."""
    with zipfile.ZipFile(real) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))


MALICIOUS = {
    "torch.save": lambda path, real, bad: torch.save({**load_checkpoint(real), "best": bad}, path),
    "torch.save, legacy": lambda path, real, bad: torch.save({"best": bad}, path, _use_new_zipfile_serialization=False),
    "save_checkpoint": lambda path, real, bad: save_checkpoint(path, {**load_checkpoint(real), "best": bad}),
    "pickle": lambda path, real, bad: path.write_bytes(pickle.dumps(bad)),
    "in ours": lambda path, real, bad: behind_a_real_one(real, pickle.dumps(bad), path),
    "builtins.eval": lambda path, real, bad: behind_a_real_one(
        real, f"cbuiltins\neval\n(V__import__('os').system('touch {bad.target}')\ntR.".encode(), path
    ),
}


def test_the_malicious_pickle_would_run(tmp_path: Path) -> None:
    target = tmp_path / "was_here"
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()


@pytest.mark.parametrize("kind", MALICIOUS)
def test_no_checkpoint_runs_anything(kind: str, run: RunDir, tmp_path: Path, fails: Fails) -> None:
    target = tmp_path / "was_here"
    real = run.newest()
    bad = real.with_name("bad.pt")
    MALICIOUS[kind](bad, real, Malicious(target))
    for path in [*run.periodic(), run.best]:
        path.unlink(missing_ok=True)
    newest = bad.rename(run.checkpoint(2))
    with pytest.raises(CheckpointError):
        Policy.load(newest)
    for arguments in (["evaluate", newest], ["evaluate", run.path], ["enjoy", newest], ["train", "--resume", run.path]):
        fails(*arguments)
    assert not target.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"config": {"env": {"id": "../../x"}}},
        {"config": 3},
        {"config": {"total_steps": 10**400, "env": {"id": "A-v0"}}},
        {"agent": [1, 2]},
        {"agent": {"weight": torch.zeros(1)}},
        {"spec": None},
        {"spec": {"env_id": "A-v0"}},
        {"env_steps": "many"},
        {"env_steps": float("inf")},
    ],
    ids=str,
)
def test_checkpoints_of_other_contents_are_refused(changes: dict[str, Any], run: RunDir, fails: Fails) -> None:
    path = run.newest()
    save_checkpoint(path, {**load_checkpoint(path), **changes})
    assert path.name in fails("evaluate", path, "--num-workers", "0")


# Metrics

ROW = b'{"iteration": 1, "env_steps": 64, "loss/total": 0.5}\n'
NO_ROWS = {
    "garbage": b"garbage",
    "NUL bytes": b"\0" * 100,
    "blank": b"",
    "no iteration": b'{"env_steps": 64}',
    "iteration is true": b'{"iteration": true, "env_steps": 64}',
    "negative": b'{"iteration": 1, "env_steps": -1}',
    "text for a number": b'{"iteration": 1, "env_steps": 64, "loss/total": "low"}',
    "null for a number": b'{"iteration": 1, "env_steps": 64, "loss/total": null}',
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
    path.write_bytes(ROW * 3 + line + b"\n")
    assert len(read_metrics(path)) == 3


def test_torn_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(ROW) + 1):
        path.write_bytes(ROW + ROW[:cut])
        assert len(read_metrics(path)) == 1 + (cut >= len(ROW) - 1)
    path.write_bytes(b"")
    assert read_metrics(path) == []


def test_endless_lines_and_what_is_no_file(tmp_path: Path) -> None:
    """100 GB of nothing is not read to its end, a pipe not waited for."""
    path = tmp_path / "metrics.jsonl"
    path.touch()
    os.truncate(path, 10**11)
    with pytest.raises(MetricsError, match="more than 1,048,576 bytes"):
        read_metrics(path)
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe", "nowhere", "x" * 300):
        with pytest.raises(MetricsError):
            read_metrics(tmp_path / name)


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
    "Infinity": b'{"a": -Infinity}',
    "1e400": b'{"a": 1e400}',
    "5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "65 bits": b'{"a": 18446744073709551616}',
    "nested lists": b'{"a": ' + b"[" * 100_000,
    "nested tables": b'{"a": ' * 100_000,
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


def test_what_is_no_json_file(tmp_path: Path) -> None:
    (tmp_path / "large.json").touch()
    os.truncate(tmp_path / "large.json", 10**11)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere", tmp_path / ("x" * 300), Path("/dev/zero")):
        with pytest.raises(JsonError):
            read_json(path)
    with pytest.raises(JsonError, match="larger than 1,000 bytes"):
        read_json(tmp_path / "large.json", max_bytes=1000)


def spoil(path: Path, *, key: str, value: Any) -> None:
    tree = json.loads(path.read_text())
    path.write_text(
        json.dumps({**tree, key: value} if value is not ... else {k: v for k, v in tree.items() if k != key})
    )


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        *[(key, ..., ": missing; must be") for key in ("checkpoint", "headline", "measures")],
        ("env_id", None, ": none is not allowed; must be text"),
        ("repeats", True, ": true is not allowed; must be a whole number"),
        ("seeds", ["a"], ': ["a"] is not allowed; must be a list of at least 1, each a whole number'),
        ("measures", {"return": 3}, ".return: 3 is not allowed; must be a table {mean, ci95}"),
        ("measures", {"return": {"mean": 1, "ci95": [1]}}, ".return.ci95: [1] is not allowed; must be a list of 2"),
        ("measures", {"return": {"mean": 1}}, ".return.ci95: missing; must be a list of 2, each a number, or none"),
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


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a = " + b"[" * 100_000, b"{" * 10, b"#" * (2**20 + 1)])
def test_a_spoilt_config_is_one_line(content: bytes, run: RunDir, fails: Fails) -> None:
    run.config.write_bytes(content)
    before = contents(run.path)
    assert str(run.config) in fails("train", "--resume", run.path)
    assert contents(run.path) == before


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


@pytest.fixture
def unstarted(tmp_path: Path) -> RunDir:
    """A run that was killed before its first checkpoint."""
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / ".iteration_0000001.pt.123.tmp").write_text("half")
    run.config.write_text("seed = 1\n")
    run.metrics.write_text("")
    return run


CONTINUE = ["train", POC, "--continue", "--total-steps", "64", *SMALL]


def test_an_unstarted_run_starts_again(unstarted: RunDir) -> None:
    assert main([*CONTINUE, "--run-dir", str(unstarted.path)]) == 0


@pytest.mark.parametrize(
    "name", ["thesis.tex", "checkpoints/bert.pt", "evaluations/notes.txt", "checkpoints/more/x.pt"]
)
def test_continue_deletes_nobody_elses_files(name: str, unstarted: RunDir, fails: Fails) -> None:
    """A folder with a config.toml in it may be anyone's."""
    file = unstarted.path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    before = contents(unstarted.path)
    assert "exists already" in fails(*CONTINUE, "--run-dir", unstarted.path)
    assert contents(unstarted.path) == before


def test_continue_deletes_nothing_behind_a_link(unstarted: RunDir, tmp_path: Path, fails: Fails) -> None:
    mine = tmp_path / "mine"
    unstarted.checkpoints.rename(mine)
    unstarted.checkpoints.symlink_to(mine)
    before = contents(tmp_path)
    assert "exists already" in fails(*CONTINUE, "--run-dir", unstarted.path)
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


@pytest.fixture
def strange_paths(tmp_path: Path) -> list[str]:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    names = ["pipe", "empty", "folder", "loop", "nowhere", "empty/below", "new\nline", "a\0b", "\udcff", "x" * 300]
    return ["", "/dev/zero", "/" + "y/" * 3000, *[str(tmp_path / name) for name in names]]


COMMANDS = [["evaluate"], ["enjoy"], ["show"], ["train"], ["benchmark"], ["train", "--resume"]]
COMMANDS += [["benchmark", POC, "--profile"], ["evaluate", POC, "--json"], ["enjoy", POC, "--video"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_strange_paths(
    command: list[str], strange_paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: Fails
) -> None:
    monkeypatch.chdir(tmp_path / "folder")
    before = contents(tmp_path)
    for path in strange_paths:
        fails(*command, path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("words", [["--json", "--"], ["--json=--"], ["--device=--"], ["--repeats", "--"]])
def test_dashes_are_no_value(words: list[str], finished: Path, fails: Fails) -> None:
    assert "has no value" in fails("evaluate", finished, *words)


def test_a_device_is_not_replaced(fails: Fails, finished: Path) -> None:
    """As root /dev/null could be renamed away by a file that is to take its place."""
    assert "not a regular file" in fails("evaluate", finished, "--json", "/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("option", ["--num-seeds", "--repeats", "--max-steps", "--first-seed", "--forget-every"])
def test_numbers_that_are_none(option: str, finished: Path, fails: Fails) -> None:
    for number in ("1e9", "10" * 3000, "-1", "", "½", "nan", str(2**31), "0x10"):
        assert len(fails("evaluate", finished, option, number)) < 500


# Environments


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    texts = {
        "hostile_raises": "raise RuntimeError('two\\nlines')",
        "hostile_exits": "import sys; sys.exit(3)",
        "hostile_syntax": "def",
        "hostile_imports": "import module_that_is_not_there",
        "hostile_prints": "print('x' * 100_000)",
        "hostile_constructor": """
import gymnasium
class Broken(gymnasium.Env):
    def __init__(self):
        raise KeyError('in the\\nconstructor')
gymnasium.register('HostileBroken-v0', Broken)
""",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in texts:
        sys.modules.pop(name, None)


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("hostile_raises:A-v0", "importing 'hostile_raises' raised RuntimeError: two lines"),
        ("hostile_exits:A-v0", "importing 'hostile_exits' raised SystemExit: 3"),
        ("hostile_syntax:A-v0", "importing 'hostile_syntax' raised SyntaxError"),
        ("hostile_imports:A-v0", "module_that_is_not_there"),
        ("hostile_prints:A-v0", "unknown environment 'hostile_prints:A-v0'"),
        ("hostile_constructor:HostileBroken-v0", "its constructor raised KeyError"),
    ],
)
def test_environments_that_fail(
    env_id: str, words: str, workers: int, modules: None, tmp_path: Path, fails: Fails
) -> None:
    before = children()
    command = ["train", POC, "--run-dir", tmp_path / "run", *SMALL[2:], "--env.id", env_id]
    assert words in fails(*command, "--env.num-workers", workers)
    assert children() == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "ppo_tbptt/ProbeAction-v0", "fixture_envs:fixture/ImageToy-v0"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_agent_meets_another_environment(env_id: str, finished: Path, fails: Fails) -> None:
    command = ["evaluate", finished, "--env.id", env_id, "--num-seeds", "2", "--num-workers", "0"]
    assert "don't fit this agent" in fails(*command)
