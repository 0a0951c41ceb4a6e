"""Mutation testing: the code is changed in small ways, one at a time; which changes does no test notice?

`make mutants` runs this file. mutmut does the work (see [tool.mutmut] in pyproject.toml) in mutants/, where a later run
goes on: functions that have changed are mutated anew, and what no test noticed is tried again. mutants.toml lists the
changes that can't be noticed. mutmut also loads this file as a plugin of pytest.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_module_from_key, orig_function_and_class_names_from_key

STATS = Path("mutmut-stats.json")
MOST_SECONDS = 1.0
"""Of a test: most of what takes longer starts processes, or does the same with more of them."""
LISTS = ("equivalent", "gpu")
KINDS = {"not noticed": "not noticed", "equivalent": "equivalent", "gpu": "need a GPU", "not tried": "not tried"}


def has_ranks(item: pytest.Item) -> bool:
    return "ranks" in (*getattr(item, "fixturenames", ()), *item.name.split("[")[0].split("_"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fastest tests come first, those that start processes last, and the slowest are left out."""
    seconds = json.loads(STATS.read_text())["duration_by_test"] if STATS.exists() else {}
    items[:] = [item for item in items if seconds.get(item.nodeid, 0.0) < MOST_SECONDS or has_ranks(item)]
    items.sort(key=lambda item: (has_ranks(item), seconds.get(item.nodeid, 0.0)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """mutmut sees which functions a test calls in this process only: ranks are tests of all that knows of ranks."""
    if os.environ.get("MUTANT_UNDER_TEST") == "stats" and has_ranks(item):
        names = state().tests_by_mangled_function_name
        state()._stats.update(name for name in names if hasattr(sys.modules[get_module_from_key(name)], "World"))
        for module, content in list(sys.modules.items()):  # functions that no test calls in this process
            if module.startswith("ppo_tbptt.") and hasattr(content, "World"):
                names = [name.removesuffix("__mutmut_orig") for name in vars(content) if name.endswith("__mutmut_orig")]
                state()._stats.update(f"{module}.{name}" for name in names)


def mutants() -> Iterator[tuple[SourceFileMutationData, str, str, tuple[str, str]]]:
    """The file's data, the mutant's name, what became of it, its function and its `old => new`."""
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        for name, code in list(data.exit_code_by_key.items()):
            if code is None or status_by_exit_code[code] in ("killed", "timeout", "segfault"):
                yield data, name, "noticed" if code else "not tried", ("", "")
                continue
            function, owner = orig_function_and_class_names_from_key(name)
            lines = get_diff_for_mutant(name, path=path).splitlines()[3:]
            old, new = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
            yield data, name, "not noticed", (f"{owner}.{function}" if owner else function, f"{old} => {new}")


def report(known: dict[tuple[str, str], str]) -> int:
    counts: dict[str, Counter[str]] = {}
    unused = set(known)
    for data, name, kind, change in mutants():
        entry = change if change in known else (change[0], "*")
        kind = known.get(entry, kind)
        counts.setdefault(str(data.path), Counter())[kind] += 1
        unused.discard(entry)
        if kind == "not noticed":
            print(f"\n{change[0]} ({name})\n{get_diff_for_mutant(name, path=data.path)}")
    print(*(f"\nlisted, but noticed or gone: {function}: {change}" for function, change in sorted(unused)), "")
    for file, count in {**counts, "all": sum(counts.values(), Counter())}.items():
        texts = [f"{count[kind]} {text}" for kind, text in KINDS.items()]
        share = count["noticed"] / max(count["noticed"] + count["not noticed"], 1)
        print(f"{file}: {count['noticed']} noticed ({share:.1%}), {', '.join(texts)}")
    return int("not noticed" in sum(counts.values(), Counter()))


def main(*arguments: str) -> int:
    tree = tomllib.loads(Path("tests/mutants.toml").read_text())
    known = {(entry["in"], change): kind for kind in LISTS for entry in tree[kind] for change in entry["changes"]}
    for data, name, kind, change in mutants():
        if kind == "not noticed" and not known.keys() & {change, (change[0], "*")}:  # again, with the tests as they are
            data.exit_code_by_key[name] = None
            data.save()
    (Path("mutants") / STATS).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        command = [Path(sys.executable).with_name("mutmut"), "run", *arguments]
        return subprocess.run(command, env=environment, check=False).returncode or report(known)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
