"""Checkpoints are written whole or not at all, and what is damaged or can't be is noticed."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import train_tiny

from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run import checkpoint
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.training.callbacks import Callback
from ppo_tbptt.training.trainer import Trainer

TREE = {"config": {"a": 1}, "agent": {"w": torch.ones(3)}, "best": None}


def test_round_trip_also_through_torch_itself(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", TREE)
    for tree in (load_checkpoint(tmp_path / "c.pt"), torch.load(tmp_path / "c.pt", weights_only=True)):
        assert torch.equal(tree["agent"]["w"], torch.ones(3))
    assert os.listdir(tmp_path) == ["c.pt"]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        save_checkpoint(tmp_path / "c.pt", TREE)
    with pytest.raises(CheckpointError, match="format 99; this version reads format 2"):
        load_checkpoint(tmp_path / "c.pt")
    save_checkpoint(tmp_path / "other.pt", {"weights": torch.ones(1)})
    with pytest.raises(CheckpointError, match="no config and agent"):
        load_checkpoint(tmp_path / "other.pt")


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save_checkpoint(path, TREE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint|format"):
            load_checkpoint(path)
    for size in range(0, len(whole), 101):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            load_checkpoint(path)


@pytest.mark.parametrize("of_torch", [False, True])
def test_a_failed_write_leaves_the_old_file(of_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's writer makes a RuntimeError of it."""

    def full(tree: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            if of_torch:
                raise RuntimeError("PytorchStreamWriter failed writing file") from None
            raise

    save_checkpoint(tmp_path / "c.pt", TREE)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path / "c.pt", {**TREE, "best": 1.0})
    assert load_checkpoint(tmp_path / "c.pt")["best"] is None
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_folder_finds_its_newest_and_sums_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of large agents have hundreds of megabytes."""
    run = RunDir.create(tmp_path / "run")
    for iteration in (2, 4):
        save_checkpoint(run.checkpoint(iteration), {**TREE, "iteration": iteration})
    (run.checkpoints / ".iteration_0000006.pt.4711.tmp").write_bytes(b"half")
    run.remove_temporary_files()
    assert sorted(run.checkpoints.iterdir()) == run.periodic() == [run.checkpoint(2), run.checkpoint(4)]
    digests: list[object] = []
    monkeypatch.setattr("hashlib.sha256", lambda make=hashlib.sha256: digests.append(made := make()) or made)
    path, tree = run.load_newest()
    assert (path, tree["iteration"], len(digests)) == (run.checkpoint(4), 4, 1)
    for path in run.periodic():
        path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints") as caught:
        run.newest()
    assert "\n" not in str(caught.value)
    save_checkpoint(run.best, TREE)
    with pytest.warns(UserWarning, match="best.pt is used instead"):
        assert run.newest() == run.best


# Contents that can't be, although the checksum fits: one error, and the run's folder as it was

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


def other_episodes(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tree], Tree]:
    """With these tensors of the environments changed."""
    return lambda tree: {"environments": [first(tree) | {key: f(first(tree)[key]) for key, f in changes.items()}]}


def refused(key: str, value: str) -> str:
    return f"checkpoint: {key}: {value} is not allowed; must be "


SPOILT: dict[str, tuple[Callable[[Tree], Tree], str]] = {
    "iteration is text": (lambda t: {"iteration": "x"}, refused("iteration", '"x"')),
    "huge iteration": (lambda t: {"iteration": 10**60}, refused("iteration", "10{60}")),
    "infinite steps": (lambda t: {"env_steps": float("inf")}, refused("env_steps", "inf")),
    "too many steps": (lambda t: {"env_steps": 10**15}, refused("env_steps", "1000000000000000")),
    "steps are true": (lambda t: {"env_steps": True}, refused("env_steps", "true")),
    "negative steps": (lambda t: {"env_steps": -1}, refused("env_steps", "-1")),
    "best is NaN": (lambda t: {"best": float("nan")}, refused("best", "nan")),
    "results are text": (lambda t: {"recent": [0.5, "a" * 50]}, refused("recent", r"\[0.5, \"a+\"\]")),
    "results are one text": (lambda t: {"recent": "0.5"}, refused("recent", '"0.5"')),
    "no optimiser": (lambda t: {"optimizer": None}, ".*NoneType' object"),
    "another optimiser": (lambda t: {"optimizer": {"state": [], "param_groups": [3]}}, "'list' object"),
    "an optimiser without state": (
        lambda t: {"optimizer": {**t["optimizer"], "state": {}}},
        "the optimiser has no state$",
    ),
    "another network's optimiser": (other_moments, "the optimiser's state is of another network$"),
    "no generators": (lambda t: {"generators": None}, ""),
    "other generators": (
        lambda t: {"generators": {k: torch.zeros(3, dtype=torch.uint8) for k in t["generators"]}},
        "",
    ),
    "other ranks": (lambda t: {"generators_of_other_ranks": 5}, ".*has no len"),
    "another rank": (lambda t: {"generators_of_other_ranks": [{}]}, "environments of 1 ranks"),
    "no level seeds": (lambda t: {"level_seeds": None}, refused("level_seeds", "none")),
    "huge level seeds": (lambda t: {"level_seeds": [10**30] * 4}, refused("level_seeds", r"\[10{30}, .*")),
    "no config": (lambda t: {"config": {"env": 3}}, "total_steps: missing"),
    "no weights": (lambda t: {"agent": None}, ""),
    "other weights": (lambda t: {"agent": {"weight": torch.zeros(1)}}, "Error.* Missing key"),
    "no environment": (lambda t: {"spec": 3}, ""),
    "no episodes": (lambda t: {"environments": None}, ".*NoneType"),
    "other states": (
        other_episodes(state=lambda x: torch.zeros(4, 3)),
        r"states of shape \(4, 3\) for 4 environments",
    ),
    "states in double precision": (other_episodes(state=lambda x: x.double()), "states of shape"),
    "starts are numbers": (other_episodes(start=lambda x: x.float()), "states of shape"),
    "states are NaN": (other_episodes(state=lambda x: x * torch.nan), "recurrent states that are not finite$"),
    "more actions than steps": (
        other_episodes(steps=torch.zeros_like),
        r"actions of shape \(\d+, 1\) for 0 steps",
    ),
    "fewer episodes": (other_episodes(seed=lambda x: x[:2]), "episodes of other than 4 environments"),
    "fewer digests": (other_episodes(digest=lambda x: x[:2]), "episodes of other than 4 environments"),
    "more steps": (other_episodes(steps=lambda x: torch.cat([x, x[:1]])), "episodes of other than 4 environments"),
    "episodes of negative steps": (other_episodes(steps=lambda x: -1 - x), "episodes of other than 4 environments"),
    "actions are negative": (other_episodes(actions=lambda x: -1 - x.long()), "actions of shape"),
    "actions are fractions": (other_episodes(actions=lambda x: x + 0.5), "actions of shape"),
    "actions without branches": (other_episodes(actions=lambda x: x[:, 0]), "actions of shape"),
    "no faults": (lambda t: {"faults": []}, ".*out of range"),
    "faults are text": (lambda t: {"faults": [["a", "b", "c"]]}, refused("faults", r"\[\[.*\]\]")),
    "fewer faults": (lambda t: {"faults": [[0, 0]]}, refused("faults", r"\[\[.*\]\]")),
    "numbering of frames is text": (
        lambda t: {"distinct_frames": ["x"]},
        refused("distinct_frames", r"\[\"x\"\]"),
    ),
}


BEFORE = {"no config": "the config in the checkpoint: "}
READ_TO_PLAY = ("infinite steps", "no config", "no weights", "other weights", "no environment")


@pytest.mark.parametrize("kind", SPOILT)
def test_contents_that_cannot_be(kind: str, run: RunDir) -> None:
    spoil, reason = SPOILT[kind]
    change(run, spoil)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=f"^{BEFORE.get(kind, 'the checkpoint can.t be gone on with: ')}{reason}"
    ) as caught:
        Trainer.resume(run.path, {"total_steps": 256})
    if kind in READ_TO_PLAY:
        with pytest.raises(InputError):
            Policy.load(run.newest())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_what_older_checkpoints_lack_begins_anew(run: RunDir) -> None:
    tree = load_checkpoint(run.newest())
    save_checkpoint(run.newest(), {key: x for key, x in tree.items() if key not in ADDED_LATER})
    callback = Callback()
    callback.name = "counts"
    with Trainer.resume(run.path, {"total_steps": 192}, callbacks=[callback]) as trainer:
        assert next(trainer).iteration == 3


ADDED_LATER = ("callbacks", "losses", "distinct_frames", "handed_in")


def test_episodes_that_were_never_played_begin_anew(run: RunDir) -> None:
    """Actions and level seeds of the right kind, which lead elsewhere: said, and trained on."""
    change(run, lambda t: {"environments": [{**first(t), "digest": first(t)["digest"] + 1}]})
    with Trainer.resume(run.path, {"total_steps": 192}) as trainer:
        assert any("not exact: 4 of 4 environments" in note for note in trainer.notes)
        assert trainer.state_dict()["environments"][0]["start"].all()
        next(trainer)
