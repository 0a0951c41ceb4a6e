"""Agents learn what can be known in advance. Thresholds say why they are where they are."""

from pathlib import Path

import numpy as np
import pytest

from ppo_tbptt import Config, Policy
from ppo_tbptt.disturbances import Shuffle
from ppo_tbptt.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"


def train(name: str, **changes: object) -> Trainer:
    """A trained trainer, closed."""
    config = Config.load(CONFIGS / f"{name}.toml").replace(device="cpu", env={"num_workers": 0}, **changes)
    with Trainer(config) as trainer:
        for _ in trainer:
            pass
    return trainer


def value(trainer: Trainer, *observations: float) -> float:
    """V of the last of ``observations``, from the start of an episode."""
    policy = Policy(trainer.agent, trainer.envs.spec, trainer.config)
    for observation in observations:
        policy.act(np.array([observation], dtype=np.float32))
    return float(policy.value)  # type: ignore[arg-type]


# The values are exact; 0.05 is what the last updates' noise leaves at these learning rates.


@pytest.mark.slow
def test_probe_constant() -> None:
    assert value(train("toy_probe_constant"), 0.0) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
def test_probe_observation() -> None:
    trainer = train("toy_probe_observation")
    assert value(trainer, 1.0) == pytest.approx(1.0, abs=0.05)
    assert value(trainer, -1.0) == pytest.approx(-1.0, abs=0.05)


@pytest.mark.slow
def test_probe_discount() -> None:
    trainer = train("toy_probe_discount")
    assert value(trainer, 0.0) == pytest.approx(trainer.config.ppo.gamma, abs=0.05)
    assert value(trainer, 0.0, 1.0) == pytest.approx(1.0, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy_probe_action", "toy_probe_action_observation"])
def test_probe_action(name: str) -> None:
    """A one-step choice that depends on the action (and the observation) alone: nothing less than all of it right."""
    trainer = train(name)
    assert trainer.evaluate(greedy=True).measures["success"].mean == 1.0


@pytest.mark.slow
def test_truncation_bootstraps() -> None:
    """Reward 1 for ever, cut every 10 steps: 1 / (1 - gamma) = 10. Without bootstrapping it would be under 6.6."""
    trainer = train("toy_truncate")
    assert value(trainer, *[0.0] * 5) == pytest.approx(10.0, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn_tanh"])
def test_poc_memory_needs_and_uses_memory(kind: str) -> None:
    """Half of the levels are right by chance; an agent that remembers the cue gets all of them."""
    trainer = train("toy_poc_memory", core={"kind": kind})
    assert trainer.evaluate().measures["success"].mean > 0.95
    assert trainer.evaluate(forget_every=1).measures["success"].mean < 0.7
    assert trainer.evaluate(disturb=Shuffle(0)).measures["success"].mean < 0.7  # what others remember is of no help


@pytest.mark.slow
def test_poc_memory_without_memory_stays_at_chance() -> None:
    """The cue is gone when the agent may move, so 0.5 is the best; 0.7 is 4 standard errors above (n = 100)."""
    trainer = train("toy_poc_memory", core={"kind": "none"})
    assert trainer.evaluate(seeds=range(200_000, 200_100), repeats=1).measures["success"].mean < 0.7
