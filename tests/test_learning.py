"""Agents learn what can be known in advance. Thresholds say why they are where they are."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ppo_tbptt import Policy
from ppo_tbptt.evaluation.evaluate import Evaluation, evaluate
from ppo_tbptt.evaluation.perturbations import Shuffle

ROOT = Path(__file__).parent.parent


def train(run: Path, name: str, *overrides: str) -> Policy:
    """The agent of a shipped config, trained by the command that a user types (and without the tests' type checks)."""
    command = [sys.executable, ROOT / "scripts/train.py", ROOT / f"configs/{name}.toml", "--run-dir", run]
    subprocess.run([*command, "--device", "cpu", "--env.num-workers", "0", *overrides], check=True, capture_output=True)
    return Policy.load(run)


def value(policy: Policy, *observations: float) -> float:
    """V of the last of ``observations``, from the start of an episode."""
    policy.reset()
    for observation in observations:
        policy.act(np.array([observation], dtype=np.float32))
    return float(policy.value)  # type: ignore[arg-type]


def play(policy: Policy, **changes: Any) -> Evaluation:
    """Held-out levels."""
    arguments = {"seeds": range(200_000, 200_050), "num_workers": 0, **changes}
    return evaluate(policy.agent, policy.config.env, **arguments)


# The values are exact; 0.05 is what the last updates' noise leaves at these learning rates.


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", {(0.0,): 1.0}),
        ("observation", {(1.0,): 1.0, (-1.0,): -1.0}),
        ("discount", {(0.0,): 0.5, (0.0, 1.0): 1.0}),  # gamma is 0.5
    ],
)
def test_values_of_probes(name: str, values: dict[tuple[float, ...], float], tmp_path: Path) -> None:
    policy = train(tmp_path / "run", f"toy_probe_{name}")
    assert {seen: value(policy, *seen) for seen in values} == pytest.approx(values, abs=0.05)


@pytest.mark.parametrize("name", ["toy_probe_action", "toy_probe_action_observation"])
def test_probe_action(name: str, tmp_path: Path) -> None:
    """A one-step choice that depends on the action (and the observation) alone: nothing less than all of it right."""
    assert play(train(tmp_path / "run", name), greedy=True).measures["success"].mean == 1.0


@pytest.mark.slow
def test_truncation_bootstraps(tmp_path: Path) -> None:
    """Reward 1 for ever, cut every 10 steps: 1 / (1 - gamma) = 10. Without bootstrapping it would be under 6.6."""
    policy = train(tmp_path / "run", "toy_truncate")
    assert value(policy, *[0.0] * 5) == pytest.approx(10.0, abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn_tanh"])
def test_poc_memory_needs_and_uses_memory(kind: str, tmp_path: Path) -> None:
    """Half of the levels are right by chance; an agent that remembers the cue gets all of them."""
    policy = train(tmp_path / "run", "toy_poc_memory", "--core.kind", kind)
    assert play(policy).measures["success"].mean > 0.95
    assert play(policy, forget_every=1).measures["success"].mean < 0.7
    assert play(policy, disturb=Shuffle(0)).measures["success"].mean < 0.7  # what others remember is of no help


@pytest.mark.slow
@pytest.mark.parametrize(("task", "chance"), [("ordered", 0.25), ("unordered", 0.5)])
def test_recall_needs_and_uses_memory(task: str, chance: float, tmp_path: Path) -> None:
    """Four items are nearly always recalled (0.99 were seen); with the state wiped no more than by chance."""
    policy = train(tmp_path / "run", f"toy_{task}_recall")
    assert play(policy).measures["recalled"].mean > 0.9
    wiped = play(policy, forget_every=1).measures["recalled"].mean
    assert abs(wiped - chance) < 4 * (chance * (1 - chance) / 200) ** 0.5


@pytest.mark.slow
def test_poc_memory_without_memory_stays_at_chance(tmp_path: Path) -> None:
    """The cue is gone when the agent may move, so 0.5 is the best; 0.7 is 4 standard errors above (n = 100)."""
    policy = train(tmp_path / "run", "toy_poc_memory", "--core.kind", "none")
    assert play(policy, seeds=range(200_000, 200_100), repeats=1).measures["success"].mean < 0.7
