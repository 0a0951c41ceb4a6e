"""A whole training equals a naive one: every parameter, the optimiser's state, and all that is logged.

Whatever is wired wrongly between environments, rollout, targets, sequences, losses, optimiser and report shows here.
"""

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import test_stride
import torch
from configs_for_tests import tiny
from ranks import run_ranks
from reference_training import Reference
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer

TOLERANCE = 1e-10
ITERATIONS = 3


def config(
    kind: str, ppo: dict[str, Any], core: dict[str, Any], model: dict[str, Any] | None = None, **env: Any
) -> Config:
    """Three iterations of 30 steps, in which episodes of 2 to 8 steps end and run over the ends of rollouts."""
    return tiny(
        total_steps=30 * ITERATIONS,
        seed=3,
        env={"id": f"reference_envs:reference/{kind}-v0", "num_envs": 3, "first_seed": 4, "num_seeds": 60, **env},
        model={"cnn_channels": [3, 4, 5], "hidden_size": 12, **(model or {})},
        core={"hidden_size": 6, **core},
        ppo={"rollout_steps": 10, "num_epochs": 3, "num_minibatches": 3, "gamma": 0.9, "gae_lambda": 0.8, **ppo},
        train={"checkpoint_every": 1},
    )


CONFIGS = {
    "lstm with dropout": config(
        "Vector",
        {
            "sequence_length": 4,
            "learning_rate": {"initial": 1e-2, "final": 1e-3, "power": 2.0, "over_steps": 50},
            "entropy_coef": {"initial": 0.1, "final": 0.01},
            "clip_range": {"initial": 0.2, "final": 0.05, "power": 2.0},
            "weight_decay": 0.1,
            "max_grad_norm": 0.3,
            "normalize_advantage": True,
        },
        {"kind": "lstm", "num_layers": 2, "dropout": 0.3, "initial_state": "learnt", "residual": True},
    ),
    "frames, whole episodes, one ratio per branch, stopped by KL": config(
        "Image",
        {
            "sequence_length": None,
            "num_minibatches": 4,
            "learning_rate": {"initial": 2e-2, "final": 1e-2},
            "jacobian_norm_coef": 0.3,
            "clip_range": 0.1,
            "entropy_coef": {"initial": 0.02, "final": 0.0, "over_steps": 60},
            "ratio": "per_branch",
            "target_kl": 0.005,
            "clip_value_loss": False,
            "max_grad_norm": 1e9,
        },
        {"kind": "ln_gru", "residual": True, "norm": True, "chrono_steps": 8},
        {"normalize_frames": True},
    ),
    "Dict, time limit, one ratio per branch": config(
        "Dict",
        {
            "sequence_length": 3,
            "num_epochs": 2,
            "num_minibatches": 7,
            "learning_rate": 1e-2,
            "entropy_coef": 0.05,
            "clip_range": {"initial": 0.3, "final": 0.1, "over_steps": 60},
            "ratio": "per_branch",
            "normalize_advantage": True,
            "max_grad_norm": 0.1,
            "grad_clip": "per_layer",
            "value_coef": 0.3,
        },
        {"kind": "rnn_tanh", "num_layers": 2, "dropout": 0.2, "execution": "padded"},
        max_episode_steps=6,
    ),
    "overlapping sequences of frames, burn-in with dropout": config(
        "Image",
        {
            "sequence_length": 5,
            "sequence_stride": 2,
            "burn_in": 3,
            "num_epochs": 2,
            "learning_rate": 1e-2,
            "entropy_coef": 0.05,
            "max_grad_norm": 0.5,
        },
        {"kind": "gru", "num_layers": 2, "dropout": 0.3},
    ),
    "overlapping sequences, burn-in, refreshed states": config(
        "Vector",
        {
            "sequence_length": 3,
            "sequence_stride": 1,
            "burn_in": 2,
            "refresh_every": 2,
            "num_epochs": 4,
            "num_minibatches": 2,
            "learning_rate": 2e-2,
            "max_grad_norm": 0.5,
            "normalize_advantage": True,
        },
        {"kind": "lru", "num_layers": 2},
    ),
    "previous action and reward, a value that hardly shapes what it shares": config(
        "Dict",
        {"sequence_length": 5, "learning_rate": 1e-2, "max_grad_norm": 0.5, "value_gradient_scale": 0.3},
        {"kind": "mingru", "num_layers": 2, "dropout": 0.3, "initial_state": "learnt"},
        {"previous_action": True, "previous_reward": True},
        max_episode_steps=6,
    ),
    "retention, overlapping sequences, burn-in": config(
        "Vector",
        {
            "sequence_length": 4,
            "sequence_stride": 2,
            "burn_in": 2,
            "num_epochs": 2,
            "learning_rate": 1e-2,
            "clip_value_loss": False,
        },
        {
            "kind": "retention",
            "num_heads": 2,
            "num_layers": 2,
            "dropout": 0.2,
            "residual": True,
            "execution": "padded",
        },
    ),
    "irnn": config(
        "Vector",
        {"sequence_length": 4, "learning_rate": 1e-2, "jacobian_norm_coef": 0.1, "clip_value_loss": False},
        {"kind": "irnn"},
    ),
    "ln_lstm": config("Vector", {"sequence_length": 3, "learning_rate": 1e-2}, {"kind": "ln_lstm", "forget_bias": 1.0}),
    "gated_delta": config(
        "Vector", {"sequence_length": 5, "learning_rate": 1e-2}, {"kind": "gated_delta", "num_heads": 2, "norm": True}
    ),
    "no memory": config(
        "Vector",
        {"sequence_length": 5, "learning_rate": 1e-2, "max_grad_norm": 0.02, "grad_clip": "value"},
        {"kind": "none"},
    ),
}
OF_RANKS = {
    name: CONFIGS[base].replace(total_steps=60 * ITERATIONS, **changes)
    for name, (base, changes) in {
        "two ranks": ("lstm with dropout", {}),
        "few sequences": (
            "lstm with dropout",
            {
                "ppo": {"num_minibatches": 11, "sequence_length": None, "target_kl": 1e-2, "jacobian_norm_coef": 0.2},
                "core": {"kind": "gru"},
            },
        ),
        "overlapping sequences": ("overlapping sequences, burn-in, refreshed states", {}),
        "frames": ("frames, whole episodes, one ratio per branch, stopped by KL", {}),
    }.items()
}


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def beginning(trainer: Trainer) -> dict[str, Any]:
    """The agent's weights, and of each rank the state of the generator that draws its dropout."""
    tree = trainer.state_dict()
    ranks = [tree["generators"], *tree["generators_of_other_ranks"]]
    return {"agent": copy.deepcopy(tree["agent"]), "dropout": [rank["torch"] for rank in ranks]}


def outcome(trainer: Trainer, report: Report) -> dict[str, Any]:
    """What an iteration made of the agent and the optimiser, and what it logged but for the clock."""
    moments = [trainer.learner.optimizer.state[p] for p in trainer.agent.parameters()]
    return {
        "parameters": torch.cat([p.detach().flatten() for p in trainer.agent.parameters()]),
        "first moment": torch.cat([x["exp_avg"].flatten() for x in moments]),
        "second moment": torch.cat([x["exp_avg_sq"].flatten() for x in moments]),
        "updates": sorted({float(x["step"]) for x in moments}),
        "logged": {tag: value for tag, value in report.scalars.items() if not tag.startswith("time/")},
    }


def train(config: Config, world: World | None = None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with Trainer(config, world=world) as trainer:
        return beginning(trainer), [outcome(trainer, report) for report in trainer]


def train_ranks(world: World, folder: Path) -> dict[str, Any]:
    """What each of two processes runs: whole trainings, and single updates."""
    torch.set_default_dtype(torch.float64)
    updates = [test_stride.update(world, case) for case in test_stride.CASES]
    return {"updates": updates, **{name: train(config, world) for name, config in OF_RANKS.items()}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(train_ranks, tmp_path_factory.mktemp("ranks"))


def assert_equal_to_plain_loops(config: Config, first: dict[str, Any], *ranks: list[dict[str, Any]]) -> None:
    with Trainer(config) as trainer:  # an agent of the right shape
        trainer.agent.load_state_dict(first["agent"])
        reference = Reference(config, trainer.agent, first["dropout"])

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([x.detach().flatten() for x in tensors])

    for iteration, outcomes in enumerate(zip(*ranks, strict=True), 1):
        before = flat(reference.agent.parameters())
        logged = reference.iterate()
        expected = {
            "parameters": flat(reference.agent.parameters()),
            "first moment": flat(reference.first_moment),
            "second moment": flat(reference.second_moment),
        }
        for actual in outcomes:
            assert actual["logged"] == pytest.approx(logged, rel=TOLERANCE, abs=TOLERANCE), f"iteration {iteration}"
            assert actual["updates"] == [reference.updates]
            for name, x in expected.items():
                torch.testing.assert_close(actual[name], x, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")
        assert (expected["parameters"] - before).abs().max() > 1e-3  # it was an update
    assert [len(rank) for rank in ranks] == [ITERATIONS] * len(ranks)


@pytest.mark.parametrize("name", CONFIGS)
def test_three_iterations_equal_those_of_plain_loops(name: str) -> None:
    assert_equal_to_plain_loops(CONFIGS[name], *train(CONFIGS[name]))


def test_iterations_of_two_ranks_equal_those_of_plain_loops(ranks: list[dict[str, Any]]) -> None:
    for name, config in OF_RANKS.items():
        (first, *_), (outcomes, others) = zip(*(rank[name] for rank in ranks), strict=True)
        assert_equal_to_plain_loops(config, first, outcomes, others)


def test_updates_of_two_ranks_equal_those_of_plain_loops(ranks: list[dict[str, Any]]) -> None:
    for number, case in enumerate(test_stride.CASES):
        wanted = test_stride.naive_update([0, 1], *case)
        for rank in ranks:
            torch.testing.assert_close(rank["updates"][number], wanted, rtol=0, atol=TOLERANCE)
