"""What the package reads, and what its processes tell each other, is never code: no module unpickles or evaluates."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ppo_tbptt"

MODULES = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "copyreg", "runpy", "yaml")
MODULES += ("multiprocessing", "torch.multiprocessing", "concurrent.futures.process", "numpy.lib.format")
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "torch.jit.load", "torch.hub.load", "torch.export.load"}
METHODS = {"read_pickle", "add_safe_globals", "share_memory_", "popen", "PackageImporter"}


def imports(tree: ast.AST) -> dict[str, str]:
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
    known = imports(tree)
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
    for path in sorted(PACKAGE.rglob("*.py")):
        assert dangers(path.read_text(encoding="utf-8"), path == PACKAGE / "run/checkpoint.py") == [], path


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
