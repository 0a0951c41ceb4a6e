"""Policy: its state, its random numbers and what it refuses (test_gymnasium_loops.py plays with it)."""

from pathlib import Path

import numpy as np
import pytest
from helpers import train_tiny

from ppo_tbptt import Policy
from ppo_tbptt.run import checkpoint as checkpoint_module
from ppo_tbptt.run import folder as folder_module
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("policy") / "run", total_steps=64)


def test_a_batch_equals_its_rows_and_resets_by_row(run: Path) -> None:
    policy, single = Policy.load(run), Policy.load(run)
    rng = np.random.default_rng(0)
    stream = rng.normal(size=(4, 3, 3)).astype(np.float32)  # steps, rows, features
    batch = []
    for t, obs in enumerate(stream):
        if t == 2:
            policy.reset(np.array([False, True, False]))
        batch.append(policy.act(obs, greedy=True))
        assert batch[-1].shape == (3,)
    for row in range(3):
        single.reset()
        actions = []
        for t, obs in enumerate(stream[:, row]):
            if t == 2 and row == 1:
                single.reset()
            actions.append(single.act(obs, greedy=True))
        assert actions == [int(step[row]) for step in batch]


def test_seeded_sampling_repeats(run: Path) -> None:
    policy = Policy.load(run)
    obs = np.zeros(3, dtype=np.float32)
    draws = []
    for seed in (1, 1, 2):
        policy.reset(seed=seed)
        draws.append([policy.act(obs) for _ in range(30)])
    assert draws[0] == draws[1] != draws[2]


def test_wrong_observations_are_named(run: Path) -> None:
    policy = Policy.load(run)
    with pytest.raises(ValueError, match=r"shape \(5,\); this agent was trained on \(3,\)"):
        policy.act(np.zeros(5))
    with pytest.raises(ValueError, match="trained on"):
        policy.act({"image": np.zeros(3)})
    policy.act(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="call reset"):
        policy.act(np.zeros(3))


def test_weights_that_do_not_belong_to_the_config(run: Path, tmp_path: Path) -> None:
    tree = load_checkpoint(run / "checkpoints" / "iteration_0000001.pt")
    tree["config"]["core"]["hidden_size"] = 9
    save_checkpoint(tmp_path / "c.pt", {k: v for k, v in tree.items() if k != "format"})
    with pytest.raises(CheckpointError, match="don't belong together"):
        Policy.load(tmp_path / "c.pt")


def test_a_checkpoint_is_read_once_and_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, verified = run / "checkpoints" / "iteration_0000001.pt", []
    for module in (checkpoint_module, folder_module):
        monkeypatch.setattr(module, "verify_checkpoint", verified.append)
    assert Policy.load(run).path == Policy.load(checkpoint).path == checkpoint
    assert verified == [checkpoint, checkpoint]
