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
    imports: set[str] = field(default_factory=set)  # modules of this package, without its name
    typing_only: set[str] = field(default_factory=set)  # those of them that only type checkers import
    private: list[str] = field(default_factory=list)  # uses of another module's private names, with their lines


def short(name: str) -> str:
    """`ppo_tbptt.models.agent` is `models.agent`; the package itself is `__init__`."""
    return name.removeprefix(PACKAGE).removeprefix(".") or "__init__"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def read_package(folder: Path) -> dict[str, Module]:
    files = {}
    for path in sorted(folder.rglob("*.py")):
        parts = (PACKAGE, *path.relative_to(folder).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {short(name): read_module(name, path, set(files)) for name, path in files.items()}


def imported(node: ast.AST, known: set[str]) -> Iterator[tuple[str, str, str]]:
    """The module, the name in it (empty for the module itself) and the local name of each import."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, "", alias.asname or alias.name
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, "relative imports are not seen here"
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            yield (full, "", alias.asname or alias.name) if full in known else (str(node.module), alias.name, "")


def read_module(name: str, path: Path, known: set[str]) -> Module:
    module, aliases = Module(), set(known)
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    guarded = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    typing_only = {id(inner) for node in guarded for inner in ast.walk(node)}
    for node in ast.walk(tree):
        for target, part, local in imported(node, known):
            if target in known and target != name:
                (module.typing_only if id(node) in typing_only else module.imports).add(short(target))
                aliases.add(local)
                if is_private(part) and isinstance(node, ast.ImportFrom):
                    module.private.append(f"{path.name}:{node.lineno} {part}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and (owner := ast.unparse(node.value)) in aliases:
            module.private.append(f"{path.name}:{node.lineno} {owner}.{node.attr}")
    return module


def layer(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return name.split(".")[0]


def upward(modules: dict[str, Module]) -> list[str]:
    return [
        f"{name} imports {target}, which is not below it"
        for name, module in modules.items()
        for target in sorted(module.imports | module.typing_only)
        if layer(name) != layer(target) and RANK[layer(target)] <= RANK.get(layer(name), -1)
    ]


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    return read_package(ROOT / PACKAGE)


def test_every_module_has_its_place(modules: dict[str, Module]) -> None:
    missing = {layer(name) for name in modules} - set(RANK)
    assert not missing, f"add to LAYERS in {Path(__file__).name}: {', '.join(missing)}"


def test_no_import_goes_up_or_round_and_none_is_private(modules: dict[str, Module]) -> None:
    assert upward(modules) == []
    graphlib.TopologicalSorter({name: module.imports for name, module in modules.items()}).prepare()
    assert [use for module in modules.values() for use in module.private] == []


@pytest.mark.parametrize("family", FORBIDDEN)
def test_stays_light(family: str, modules: dict[str, Module]) -> None:
    names = "; ".join(f"import {PACKAGE}.{name}" for name in modules if layer(name) == family)
    code = f"import sys; {names}; print(*({FORBIDDEN[family]} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
    for path in (ROOT / PACKAGE / family).rglob("*.py"):
        assert "import torch" not in path.read_text(encoding="utf-8"), path  # nor when a function is called


@pytest.mark.parametrize(
    "argv",
    [
        ["nope"],
        ["show", "nowhere.toml"],
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
        "types.py": "import torch.nn",
        "ppo/losses.py": "from ppo_tbptt.run import folder\nfrom ppo_tbptt.types import _secret",
        "run/folder.py": "from ppo_tbptt.ppo import losses",
        "models/agent.py": "from ppo_tbptt import types as t\ndef f():\n    import ppo_tbptt.ppo.losses\nt._hidden",
        "strange.py": "import math",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    modules = read_package(tmp_path)
    assert upward(modules) == [
        "models.agent imports ppo.losses, which is not below it",
        "ppo.losses imports run.folder, which is not below it",
    ]
    assert {layer(name) for name in modules} - set(RANK) == {"strange"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({name: module.imports for name, module in modules.items()}).prepare()
    uses = [use for module in modules.values() for use in module.private]
    assert uses == ["agent.py:4 t._hidden", "losses.py:2 _secret"]


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
    for text in ("from https://py" + "pi.org/simple", "in /" + "root/x", "see issue" + " #12"):
        assert UNWANTED.search(text)
    assert not UNWANTED.search("https://pytorch.org, ./work/x, and/or/home/y, the issue with 3 seeds")
