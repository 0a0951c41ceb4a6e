"""Every shipped config builds its agent and trains for one tiny iteration."""

from pathlib import Path

import pytest

from ppo_tbptt.config import Config
from ppo_tbptt.training.trainer import Trainer

FOLDER = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.toml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_one_iteration(path: Path) -> None:
    config = Config.load(path)
    config = config.replace(
        device="cpu",
        env={"num_envs": 2, "num_workers": 0},
        ppo={"rollout_steps": 4, "num_minibatches": 1, "num_epochs": 1, "sequence_length": 2},
    )
    with Trainer(config) as trainer:
        report = next(trainer)
    assert report.env_steps == 8
    assert report.scalars["optim/updates"] == 1
    assert report.scalars["policy/approx_kl"] == pytest.approx(0, abs=1e-6)  # the first update replays the rollout
