"""Mutation testing: changes the code in small ways, one at a time, and names the changes that no test notices.

`make mutants` runs this file. mutmut does the work (see [tool.mutmut] in pyproject.toml) in mutants/, where a later run
goes on: functions that have changed are mutated anew, and what no test noticed is tried again. mutants.toml lists the
changes that nobody can notice. mutmut loads this file as a plugin of pytest, too, which puts the fastest tests first.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FOLDER, STATS = Path("mutants"), "mutmut-stats.json"
LISTS = {"equivalent": "equivalent (listed)", "gpu": "needs a GPU (listed)"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if Path(STATS).exists():
        seconds = json.loads(Path(STATS).read_text())["duration_by_test"]
        items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


def forget_survivors() -> None:
    """So that mutmut tries them again, with the tests as they are now."""
    for file in FOLDER.rglob("*.meta"):
        meta = json.loads(file.read_text())
        codes = meta["exit_code_by_key"]
        meta["exit_code_by_key"] = {key: code if noticed(code) else None for key, code in codes.items()}
        file.write_text(json.dumps(meta))
    (FOLDER / STATS).unlink(missing_ok=True)


def noticed(code: int | None) -> bool:
    from mutmut.stats import status_by_exit_code

    return status_by_exit_code[code] in ("killed", "timeout", "segfault")


def change(diff: str) -> str:
    """`old => new`, the lines that differ."""
    lines = diff.splitlines()[3:]
    old, new = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return f"{old} => {new}"


def listed() -> dict[tuple[str, str], str]:
    """The name of the list by function and change."""
    tree: dict[str, list[dict[str, Any]]] = tomllib.loads(Path("tests/mutants.toml").read_text())
    return {(entry["in"], change): name for name in LISTS for entry in tree[name] for change in entry["changes"]}


def report() -> int:
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.utils.file_utils import walk_mutatable_files
    from mutmut.utils.format_utils import orig_function_and_class_names_from_key

    known, seen, survivors = listed(), set(), []
    by_file: dict[str, Counter[str]] = {}
    for path in sorted(walk_mutatable_files()):
        data = SourceFileMutationData(path=path)
        data.load()
        counts = by_file[str(path)] = Counter()
        for key, code in data.exit_code_by_key.items():
            if noticed(code):
                counts["killed"] += 1
                continue
            name, owner = orig_function_and_class_names_from_key(key)
            diff = get_diff_for_mutant(key, path=path)
            place = f"{owner}.{name}" if owner else name, change(diff)
            seen.add(place)
            counts[known.get(place, "survived")] += 1
            if place not in known:
                survivors.append(f"{key} ({place[0]})\n{diff}\n")
    print("", *survivors, sep="\n")
    for place in known.keys() - seen:
        print(f"listed in mutants.toml, but noticed by a test, or gone: {place[0]}: {place[1]}")
    for file, counts in {**by_file, "all": sum(by_file.values(), Counter())}.items():
        counted = counts["killed"] + counts["survived"]
        texts = [
            f"{counts[name]} {text}" for name, text in {"killed": "killed", "survived": "survived", **LISTS}.items()
        ]
        print(f"{file}: {', '.join(texts)}; {counts['killed'] / max(counted, 1):.1%} killed of those that count")
    return int(bool(survivors))


if __name__ == "__main__":
    forget_survivors()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder}
        subprocess.run([Path(sys.executable).with_name("mutmut"), "run", *sys.argv[1:]], env=environment, check=True)
    sys.exit(report())
