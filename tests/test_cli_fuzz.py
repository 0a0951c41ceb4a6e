"""Any command line: a valid one, or one line and exit code 2. Nothing hangs, and nothing is written outside."""

import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import POC, SMALL

from ppo_tbptt.cli import COMMANDS, main
from ppo_tbptt.config import describe_fields
from ppo_tbptt.envs import SingleEnv, VectorEnv
from ppo_tbptt.training.trainer import Trainer


class Valid(BaseException):
    """Raised where a command would begin to play or to train."""


WRITES = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate", "os.chmod"}
inside: list[str] = []  # the folder that may be written to, while that is watched
outside: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: notes what is opened for writing, made, renamed or deleted elsewhere."""
    if not inside or event not in {"open", *WRITES} or isinstance(args[0], int):
        return
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event == "open" and not (set(args[1] or "") & set("wax+") or (args[2] or 0) & flags):
        return
    full = os.path.abspath(os.fsdecode(args[0]))
    if not full.startswith(inside[0]) and "__pycache__" not in full and full != os.devnull:
        outside.append(f"{event} {full}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and things that are none."""
    folder = tmp_path_factory.mktemp("files")
    assert main(["train", POC, "--run-dir", str(folder / "run"), "--total-steps", "64", *SMALL]) == 0
    shutil.copy(POC, folder / "toy.toml")
    (folder / "garbage").write_bytes(bytes(range(256)))
    (folder / "unstarted").mkdir()
    (folder / "unstarted" / "config.toml").write_bytes(Path(POC).read_bytes())
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def seams(files: Path) -> Iterator[Path]:
    """A valid command line ends where it would begin to train or to play."""

    def stop(*args: object, **kwargs: object) -> None:
        raise Valid

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(Trainer, "__init__", stop)
        patch.setattr(VectorEnv, "__init__", stop)
        patch.setattr(SingleEnv, "reset", stop)
        sys.addaudithook(watch)  # for good: there is no way to remove one
        yield files


FILES = ["run", "run/checkpoints/iteration_0000001.pt", "run/config.toml", "toy.toml", "garbage", "pipe", "unstarted"]
FILES += ["", "nowhere", "nowhere/below", "toy.toml/below", "run/../run", "run/evaluations/final.json"]
places = st.sampled_from([*(f"@{name}" for name in FILES), "/dev/zero", "/", ".", "..", "-", "x" * 300])
numbers = st.sampled_from(["0", "1", "-1", "1e3", "1e400", "nan", "inf", "0.5", "9" * 5000, str(2**31), "²", "٣"])
values = st.sampled_from(["true", "none", "lstm", "cpu", "cuda:99", "[1, 2]", "{a = 1}", "{initial = 1}", "[" * 2000])
values |= st.sampled_from(
    ["fixture_envs:fixture/Tracer-v0", "CartPole-v1", "no_module:A-v0", "../x:A", "out.gif", "out.json"]
)
garbage = st.sampled_from(["", "a\0b", "\udcff", "[/x]", "%s", "{", "\x1b[31m", "\n", "=", "-", "--", "--=", '"'])
garbage |= st.text(max_size=8)
anything = numbers | values | places | garbage


def own_options(command: str) -> dict[str, list[str]]:
    """From its --help: values that fit each option, none for a switch."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    found = re.findall(r"^  (--[a-z][a-z-]*)(?: ([A-Z_]+))?", out.getvalue(), re.MULTILINE)
    fitting = {"FILE": ["out.json", "out.gif", "out.svg"], "RUN": ["@run"], "RUN_DIR": ["new"], "DEVICE": ["cpu"]}
    return {name: fitting.get(metavar, ["1", "2", "50"]) if metavar else [] for name, metavar in found}


def command_lines(command: str) -> st.SearchStrategy[list[str]]:
    """Half of them mostly right, half of them anything."""
    own = own_options(command)
    trains = command in ("train", "show", "benchmark")
    fields = {
        "--" + row.key.replace("_", "-"): [row.default]
        for row in describe_fields()
        if (trains or row.key.startswith("env.")) and row.default not in ("none", "required")
    }

    def fitting(known: dict[str, list[str]]) -> st.SearchStrategy[tuple[str, ...]]:
        pairs = [(name, value) for name, values in known.items() for value in values]
        return st.sampled_from([*pairs, *((name,) for name, values in known.items() if not values)])

    names = st.sampled_from([*own, *fields, "--seed", "--env.id", "--env.options.num-show-steps"])
    wild = st.tuples(names, anything) | st.tuples(anything) | st.tuples(names)
    wild |= st.builds(lambda name, value: (f"{name}={value}",), names, anything)
    right = st.tuples(
        st.just(("@toy.toml" if trains else "@run",)), st.lists(fitting(own) | fitting(fields), max_size=3)
    )
    resumed = st.tuples(st.just(("--resume", "@run") if command == "train" else ("@run",)), st.lists(wild, max_size=1))
    lines = right.flatmap(lambda line: st.lists(wild, max_size=1).map(lambda last: [line[0], *line[1], *last]))
    lines |= resumed.map(lambda line: [line[0], *line[1]]) | st.lists(wild, max_size=4)
    return lines.map(lambda parts: [token for part in parts for token in part])


def tree(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def check(command: str, argv: list[str], files: Path) -> str:
    """Run one command line in a fresh folder; how it ended."""
    argv = [str(files / token[1:]) if token.startswith("@") else token for token in argv]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    before, home = tree(files), os.getcwd()
    with tempfile.TemporaryDirectory(dir=files.parent) as folder:
        os.chdir(folder)
        inside.append(str(files.parent))
        outside.clear()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code: int | str | None = main([command, *argv])
        except Valid:
            code = "valid"
        except SystemExit as end:
            code = "help" if end.code == 0 and {"-h", "--help"} & set(argv) else "exit"
        finally:
            inside.clear()
            os.chdir(home)
        assert outside == []
        if code == 2:
            err.seek(0)
            text = err.read()
            assert text.startswith("error: ") and text.count("\n") == 1 and text[:-1].isprintable()
            assert not any(Path(folder).iterdir())
            assert tree(files) == before
        else:
            assert code in (0, "valid", "help")
    return str(code)


@pytest.mark.parametrize("examples", [25, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("command", COMMANDS)
def test_command_lines(command: str, examples: int, seams: Path) -> None:
    ends: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(command_lines(command))
    def run(argv: list[str]) -> None:
        ends[check(command, argv, seams)] += 1

    run()
    assert ends["2"] and ends.total() >= 25
    if examples > 25 and command in {"train", "evaluate", "compare", "enjoy", "probe", "show", "benchmark"}:
        assert ends.total() > ends["2"], "not only wrong ones"
