"""Who may import whom, and what no file may name."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ppo_tbptt"

# Top to bottom. A module imports from lower lines and from its own folder, where no cycle may come of it.
LAYERS = """
    __init__ __main__
    cli
    commands
    analysis watch benchmark
    training
    evaluation
    run
    ppo
    models
    envs
    config
    runtime
    types
"""
RANK = {name: rank for rank, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}

# What a module may not import, by itself or through others: the config is read, and the workers start, without torch.
FORBIDDEN = {"config": {"torch", "numpy", "gymnasium"}, "envs": {"torch"}}


@dataclass
class Module:
    internal: set[str] = field(default_factory=set)  # short names of modules of this package
    typing_only: set[str] = field(default_factory=set)  # those of them that only type checkers import
    external: set[str] = field(default_factory=set)  # top-level names of other packages
    private: list[str] = field(default_factory=list)  # uses of another module's private names, with their lines


def short(name: str) -> str:
    """`ppo_tbptt.models.agent` is `models.agent`; the package itself is `__init__`."""
    return name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def without_typing_only(tree: ast.AST) -> Iterator[ast.AST]:
    """Like `ast.walk`, past the bodies of `if TYPE_CHECKING`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "T"):
            for other in child.orelse:
                yield from without_typing_only(other)
        else:
            yield from without_typing_only(child)


def read_package(folder: Path) -> dict[str, Module]:
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {short(name): read_module(name, path, set(files)) for name, path in files.items()}


def read_module(name: str, path: Path, known: set[str]) -> Module:
    module, aliases = Module(), set()
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    parents = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    at_run_time = {id(node) for node in without_typing_only(tree)}

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, alias.asname) for alias in node.names]
            private = []
        elif isinstance(node, ast.ImportFrom):
            package = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])])
            source = package if node.level else node.module or ""
            full = [(f"{source}.{alias.name}", alias) for alias in node.names]
            targets = [
                (target, alias.asname or alias.name) if target in known else (source, None) for target, alias in full
            ]
            private = [alias.name for target, alias in full if is_private(alias.name)]
        else:
            continue
        for target, alias in targets:
            if target.split(".")[0] == PACKAGE:
                (module.internal if id(node) in at_run_time else module.typing_only).add(short(target))
                module.private += [f"{path.name}:{node.lineno} {private_name}" for private_name in private]
                aliases |= {alias} - {None}
            elif id(node) in at_run_time:
                module.external.add(target.split(".")[0])

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner in aliases or owner in known:
                module.private.append(f"{path.name}:{node.lineno} {owner}.{node.attr}")
    module.internal.discard(short(name))
    module.typing_only.discard(short(name))
    return module


def layer(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return name.split(".")[0]


def upward(modules: dict[str, Module]) -> list[str]:
    found = []
    for name, module in modules.items():
        for target in sorted(module.internal | module.typing_only):
            here, there = layer(name), layer(target)
            if here != there and RANK.get(there, 99) <= RANK.get(here, 0):
                found.append(f"{name} imports {target}, which is not below it")
    return found


def reached(name: str, modules: dict[str, Module]) -> set[str]:
    """The packages that a module imports, by itself or through others of ours."""
    todo, seen = {name}, set()
    while todo:
        seen.add(current := todo.pop())
        todo |= (modules[current].internal & set(modules)) - seen
    return set().union(*(modules[name].external for name in seen))


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_package(ROOT / PACKAGE)


def test_every_module_has_its_place(modules: dict[str, Module]) -> None:
    missing = {layer(name) for name in modules} - set(RANK)
    assert not missing, f"add to LAYERS in {Path(__file__).name}: {', '.join(missing)}"


def test_no_import_goes_up(modules: dict[str, Module]) -> None:
    assert upward(modules) == []


def test_no_cycle(modules: dict[str, Module]) -> None:
    graphlib.TopologicalSorter({name: module.internal for name, module in modules.items()}).prepare()


def test_no_private_name_is_imported(modules: dict[str, Module]) -> None:
    assert [use for module in modules.values() for use in module.private] == []


@pytest.mark.parametrize("family", FORBIDDEN)
def test_stays_light(family: str, modules: dict[str, Module]) -> None:
    names = [name for name in modules if name.split(".")[0] == family]
    assert names
    for name in names:
        assert not reached(name, modules) & FORBIDDEN[family], name

    # The same at run time: other packages could bring them in.
    imports = "; ".join(f"import {PACKAGE}.{name}" for name in names)
    code = f"import sys; {imports}; print(*({FORBIDDEN[family]} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


@pytest.mark.parametrize(
    "argv",
    [
        ["nope"],
        ["show", "nowhere.toml"],
        ["show", "configs/quickstart.toml", "--ppo.gama", "1"],
        ["show", "--nope"],
        ["train", "nowhere.toml"],
        ["train", "configs/quickstart.toml", "--ppo.gama", "1"],
    ],
    ids=" ".join,
)
def test_wrong_input_is_reported_without_torch(argv: list[str]) -> None:
    code = f"import sys; from {PACKAGE}.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == ["2", "False"], result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_errors_have_one_of_two_bases() -> None:
    """Those that end a command with one line, and with exit code 2 or 1."""
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert len(bases) > 10
    caught_where_raised = {"CompileError"}
    for name in bases.keys() - {"InputError", "RunError"} - caught_where_raised:
        assert bases[name] <= {"InputError", "RunError"}, name


def test_the_checks_see(tmp_path: Path) -> None:
    """On a package that breaks every rule, each is reported."""
    for name, text in {
        "__init__.py": "",
        "config/__init__.py": "from typing import TYPE_CHECKING as T\nif T:\n    import numpy\nfrom .. import types",
        "types.py": "import torch.nn",
        "ppo/losses.py": "from ppo_tbptt.run import folder\nfrom ppo_tbptt.types import _secret",
        "run/folder.py": "from ppo_tbptt.ppo import losses",
        "models/__init__.py": "from ..types import Obs\ndef f():\n    from ..ppo.losses import ppo_loss",
        "models/agent.py": "import ppo_tbptt.models\nfrom ppo_tbptt import types as t\nt._hidden, t.__doc__",
        "strange.py": "import math",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = read_package(tmp_path)
    assert upward(modules) == [
        "models imports ppo.losses, which is not below it",
        "ppo.losses imports run.folder, which is not below it",
    ]
    assert {layer(name) for name in modules} - set(RANK) == {"strange"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({name: module.internal for name, module in modules.items()}).prepare()
    assert [use for module in modules.values() for use in module.private] == [
        "agent.py:3 t._hidden",
        "losses.py:2 _secret",
    ]
    assert reached("config", modules) == {"typing", "torch"}


# Where the packages come from, folders of one machine, and numbers of a tracker say nothing to who reads the code.
UNWANTED = re.compile(
    r"\b(?:py[p]i|test\.py[p]i|files\.pythonh[o]sted|registry\.np[m]js|download\.pyt[o]rch)\.(?:org|com)\b"
    r"|(?<![\w.~/-])/(?:root|home|work|opt|Users)/\w"
    r"|\bissues?\s+(?:show\b|#?\d+)",
    re.IGNORECASE,
)


def test_no_file_names_hosts_machines_or_the_tracker() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.split("\0")):
        path = ROOT / name
        if path.is_file() and b"\0" not in (data := path.read_bytes()):
            for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
                found += [f"{name}:{number} {match[0]}" for match in UNWANTED.finditer(line)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "unwanted"),
    [
        ("from https://py" + "pi.org/simple", True),
        ("in /" + "root/x and /" + "work/y", True),
        ("see issue" + " #12", True),
        ("https://pytorch.org", False),
        ("./work/x, and/or/home/y, the issue with 3 seeds", False),
    ],
)
def test_what_is_unwanted(text: str, unwanted: bool) -> None:
    assert bool(UNWANTED.search(text)) is unwanted
