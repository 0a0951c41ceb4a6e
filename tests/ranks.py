"""What the ranks of the distributed tests do, and how they are started."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from configs_for_tests import tiny
from helpers import fake_rollout, fake_targets, small_agent, warmed_up
from torch import Tensor, nn

from ppo_tbptt.config import PPOConfig, Schedule
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo import all_reduce
from ppo_tbptt.ppo import learner as learner_module
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Rollout, Sequences, Targets

STEPS, ENVS = 12, 3
STILL = Schedule(initial=0.0)
CASES: dict[str, PPOConfig] = {
    # At learning rate 0 every minibatch's gradient is taken at the same weights.
    "gradients": PPOConfig(learning_rate=STILL, num_minibatches=3, num_epochs=2, normalize_advantage=True),
    "plain advantages": PPOConfig(learning_rate=STILL, num_minibatches=3, num_epochs=1),
    "few sequences": PPOConfig(learning_rate=STILL, num_minibatches=8, num_epochs=2, normalize_advantage=True),
    "warm-up steps": PPOConfig(learning_rate=STILL, num_minibatches=3, num_epochs=2, normalize_advantage=True),
    "whole update": PPOConfig(
        learning_rate=Schedule(initial=1e-3),
        num_minibatches=6,
        num_epochs=3,
        sequence_length=4,
        normalize_advantage=True,
        max_grad_norm=0.05,
        target_kl=1e3,
    ),
}
"""Updates that both ways must do alike. Rank 1 has one sequence per environment where nothing cuts it."""


def cut_of(name: str) -> Callable[[Tensor, int | None], Sequences]:
    """How a case cuts rollouts."""
    return warmed_up if name == "warm-up steps" else cut


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in numbers.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(function: Callable[[World, Path], Any], folder: Path) -> list[Any]:
    """What ``function`` returns on each of two ranks."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    processes = [context.Process(target=_rank, args=(function, folder, rank, port)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(function: Callable[[World, Path], Any], folder: Path, rank: int, port: int) -> None:
    os.environ.update(environment(rank, 2, port))
    torch.set_num_threads(1)
    all_reduce.LARGE = 100  # so that a small agent has large gradients and small ones
    with World.join() as world:
        torch.save(function(world, folder), folder / f"{rank}.pt")
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # none but on Linux
    assert not [name for name in names if "gloo" in name]  # what is left of a group can crash the process's end


# --- updates -------------------------------------------------------------------------------------------------------


def data(ranks: tuple[int, ...], dtype: torch.dtype) -> tuple[Agent, Rollout, Targets]:
    """An agent and the rollouts of these ranks side by side. Rank 0 has many episodes, rank 1 a single one each."""
    agent = small_agent()
    parts = []
    for rank in ranks:
        start = torch.rand(STEPS, ENVS, generator=torch.Generator().manual_seed(7)) < (0.4, 0.0)[rank]
        rollout = fake_rollout(agent, start, seed=rank)
        parts.append((rollout, fake_targets(rollout, seed=10 + rank)))
    agent = agent.to(dtype)

    def join(xs: list[Any]) -> Any:
        if isinstance(xs[0], Tensor):
            x = torch.cat(xs, 1)
            return x.to(dtype) if x.is_floating_point() else x
        if isinstance(xs[0], dict):
            return {key: join([x[key] for x in xs]) for key in xs[0]}
        return replace(xs[0], **{f.name: join([getattr(x, f.name) for x in xs]) for f in fields(xs[0])})

    return agent, join([part[0] for part in parts]), join([part[1] for part in parts])


def permutations(rank: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + rank)


def update(ranks: tuple[int, ...], name: str, dtype: torch.dtype, world: World) -> dict[str, Any]:
    """Gradients of each minibatch before clipping, parameters and statistics after an update."""
    agent, rollout, targets = data(ranks, dtype)
    gradients: list[Tensor] = []
    clip = nn.utils.clip_grad_norm_

    def recorded(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, max_norm)

    nn.utils.clip_grad_norm_, learner_module.cut = recorded, cut_of(name)
    try:
        learner = Learner(agent, CASES[name], total_steps=1000, generator=permutations(ranks[0]), world=world)
        stats = learner.update(rollout, targets, 0, Timer())
    finally:
        nn.utils.clip_grad_norm_, learner_module.cut = clip, cut
    figures = {tag: x for tag, x in stats.scalars.items() if tag != "sequences/padding_fraction"}
    parameters = torch.cat([p.detach().flatten() for p in agent.parameters()])
    return {"gradients": gradients, "parameters": parameters, "figures": figures}


def updates(world: World, folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (name, str(dtype)): update((world.rank,), name, dtype, world)
        for name in CASES
        for dtype in (torch.float32, torch.float64)
    }


# --- whole runs ----------------------------------------------------------------------------------------------------


def talk(world: World, folder: Path) -> dict[str, Any]:
    x = torch.arange(4.0) + 10 * world.rank
    weights = torch.full((3,), float(world.rank))
    world.broadcast_(weights)
    return {
        "json": world.gather_json({"rank": world.rank, "text": "ä" * world.rank, "number": 0.1}),
        "largest": world.largest(5 - world.rank),
        "variance": world.variance(x),
        "broadcast": weights.tolist(),
    }


def train(world: World, folder: Path) -> dict[str, Any]:
    """Two iterations, and the same run resumed for one more."""
    config = tiny(
        train={"checkpoint_every": 1, "eval_every": 2}, total_steps=384, core={"num_layers": 2, "dropout": 0.2}
    )
    out: dict[str, Any] = {}
    with Trainer(config, folder / "run", world=world) as trainer:
        assert trainer.levels is not None
        out["first seeds"] = [trainer.levels.peek(env) for env in range(trainer.envs.num_envs)]
        out["iterations"] = trainer.num_iterations
        out["rows"] = [timeless(next(trainer).row()) for _ in range(2)]
        out["saved"] = trainer.state_dict()
    with Trainer.resume(folder / "run", world=world) as trainer:
        out["resumed"] = trainer.state_dict()
        out["rows"] += [timeless(report.row()) for report in trainer]
        out["parameters"] = torch.cat([p.detach().flatten() for p in trainer.agent.parameters()])
    return out


def timeless(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith("time/")}


def everything(world: World, folder: Path) -> dict[str, Any]:
    """One start of two ranks for all of it: a start takes seconds."""
    return {"updates": updates(world, folder), "talk": talk(world, folder), "train": train(world, folder)}
