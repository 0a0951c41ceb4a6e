"""A checkpoint whose checksum fits and whose contents can't be: one error, and the run's folder as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_tiny

from ppo_tbptt.run.checkpoint import load_checkpoint, save_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.training.trainer import Trainer

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("saved") / "run", total_steps=128)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunDir:
    """A copy of a finished run, to be spoilt."""
    return RunDir(Path(shutil.copytree(finished, tmp_path / "run")))


def change(run: RunDir, spoil: Callable[[Tree], Tree]) -> None:
    tree = load_checkpoint(run.newest())
    save_checkpoint(run.newest(), {**tree, **spoil(tree)})


def first(tree: Tree) -> Tree:
    return tree["environments"][0]


def other_moments(tree: Tree) -> Tree:
    state = {key: {**moments, "exp_avg_sq": torch.zeros(3)} for key, moments in tree["optimizer"]["state"].items()}
    return {"optimizer": {**tree["optimizer"], "state": state}}


SPOILT: dict[str, Callable[[Tree], Tree]] = {
    "iteration is text": lambda t: {"iteration": "x"},
    "huge iteration": lambda t: {"iteration": 10**30},
    "steps are true": lambda t: {"env_steps": True},
    "best is NaN": lambda t: {"best": float("nan")},
    "results are text": lambda t: {"recent": ["a"]},
    "no optimiser": lambda t: {"optimizer": None},
    "another optimiser": lambda t: {"optimizer": {"state": [], "param_groups": [3]}},
    "an optimiser without state": lambda t: {"optimizer": {**t["optimizer"], "state": {}}},
    "another network's optimiser": other_moments,
    "no generators": lambda t: {"generators": None},
    "other generators": lambda t: {"generators": {k: torch.zeros(3, dtype=torch.uint8) for k in t["generators"]}},
    "other ranks": lambda t: {"generators_of_other_ranks": 5},
    "no level seeds": lambda t: {"level_seeds": None},
    "huge level seeds": lambda t: {"level_seeds": [10**30] * 4},
    "no config": lambda t: {"config": {"env": 3}},
    "no weights": lambda t: {"agent": None},
    "no environment": lambda t: {"spec": 3},
    "no episodes": lambda t: {"environments": None},
    "other states": lambda t: {"environments": [{**first(t), "state": torch.zeros(4, 3)}]},
    "states are NaN": lambda t: {"environments": [{**first(t), "state": first(t)["state"] * torch.nan}]},
    "more actions than steps": lambda t: {"environments": [{**first(t), "steps": torch.zeros(4, dtype=torch.int64)}]},
    "fewer episodes": lambda t: {"environments": [{**first(t), "seed": first(t)["seed"][:2]}]},
    "no faults": lambda t: {"faults": []},
    "faults are text": lambda t: {"faults": [["a", "b", "c"]]},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_contents_that_cannot_be(kind: str, run: RunDir) -> None:
    change(run, SPOILT[kind])
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as caught:
        Trainer.resume(run.path, {"total_steps": 256})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_episodes_that_were_never_played_begin_anew(run: RunDir) -> None:
    """Actions and level seeds of the right kind, which lead elsewhere: said, and trained on."""
    change(run, lambda t: {"environments": [{**first(t), "digest": first(t)["digest"] + 1}]})
    with Trainer.resume(run.path, {"total_steps": 192}) as trainer:
        assert any("not exact: 4 of 4 environments" in note for note in trainer.notes)
        assert trainer.state_dict()["environments"][0]["start"].all()
        next(trainer)
