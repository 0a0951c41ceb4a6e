"""Who may import whom, that nothing that is read is executed, and what no file may name."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
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
FORBIDDEN = {"config": {"torch", "numpy", "gymnasium"}, "envs": {"torch"}, "envs.workers.worker": {"ppo_tbptt.config"}}


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}


def layer(name: str) -> str:
    """The folder of a module, or the module itself where it lies in none."""
    return f"{name}.__init__".split(".")[1]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imported(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Of each import from this package: the module, and the name in it or the local name of the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or alias.name) for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not seen here"
            for alias in node.names if node.module in FILES else ():
                full = f"{node.module}.{alias.name}"
                yield (full, "", alias.asname or alias.name) if full in FILES else (str(node.module), alias.name, "")


class AtRuntime(ast.NodeTransformer):
    """Removes what only type checkers import."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else node


def test_no_import_goes_up_or_round_and_none_is_private() -> None:
    missing = {layer(name) for name in FILES} - set(RANK)
    assert not missing, f"add to LAYERS in {Path(__file__).name}: {', '.join(missing)}"
    graph, wrong = {}, []
    for name, path in FILES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        found = list(imported(tree))
        for target, part, _ in found:
            if layer(name) != layer(target) and RANK[layer(target)] <= RANK[layer(name)]:
                wrong.append(f"{name} imports {target}, which is not below it")
            if is_private(part):
                wrong.append(f"{name} imports {target}.{part}, which is private")
        modules = {local for _, part, local in found if not part}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and ast.unparse(node.value) in modules:
                wrong.append(f"{name} uses {ast.unparse(node)}, which is private")
        graph[name] = {target for target, _, _ in imported(AtRuntime().visit(tree))} - {name}
    assert wrong == []
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("family", FORBIDDEN)
def test_stays_light(family: str) -> None:
    names = "; ".join(f"import {name}" for name in FILES if name.startswith(f"{PACKAGE}.{family}"))
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
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    caught_where_raised = {"CompileError"}
    for name in bases.keys() - {"InputError", "RunError"} - caught_where_raised:
        assert bases[name] <= {"InputError", "RunError"}, name


# What the package reads, and what its processes tell each other, is never code: no module unpickles or evaluates.
MODULES = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg", "runpy", "yaml")
MODULES += ("multiprocessing", "torch.multiprocessing", "concurrent.futures.process", "numpy.lib.format")
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "torch.jit.load", "torch.hub.load", "torch.export.load"}
METHODS = {"read_pickle", "add_safe_globals", "share_memory_", "popen", "PackageImporter"}


def full_names(tree: ast.AST) -> dict[str, str]:
    """Full names by local name: `{"np": "numpy", "load": "torch.load"}`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dangers(text: str, is_checkpoint: bool = False) -> list[str]:
    """What in a module's source could execute what it is given, with its line."""
    tree = ast.parse(text)
    known = full_names(tree)
    found = [f"imports {x}" for x in known.values() if any(f"{x}.".startswith(f"{module}.") for module in MODULES)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = known.get(first, first) + dot + rest
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        wrong = name in CALLS or last in METHODS
        wrong |= "object" in last and name.startswith("torch.distributed.")  # these pickle
        wrong |= name == "torch.load" and not (is_checkpoint and keywords.get("weights_only") == "True")
        wrong |= keywords.get("allow_pickle", "False") != "False" or keywords.get("shell", "False") != "False"
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_no_module_executes_what_it_reads() -> None:
    for name, path in FILES.items():
        assert dangers(path.read_text(encoding="utf-8"), name == f"{PACKAGE}.run.checkpoint") == [], path


def test_the_check_sees() -> None:
    for text in (
        "def f():\n    from torch.multiprocessing import Queue",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ):
        assert dangers(text), text
    assert dangers("import torch\ntorch.load('x', weights_only=False)", is_checkpoint=True)
    assert not dangers("import torch\ntorch.load('x', weights_only=True)", is_checkpoint=True)


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
