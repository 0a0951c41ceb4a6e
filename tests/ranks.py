"""What the ranks of the distributed tests do, and how they are started."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from configs_for_tests import tiny
from helpers import timeless
from reference_curriculum import CONFIG, Record

from ppo_tbptt.ppo import all_reduce
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.training.trainer import Trainer


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


def train(world: World, folder: Path) -> dict[str, Any]:
    """Two iterations, and the same run resumed for one more."""
    config = tiny(
        train={"checkpoint_every": 1, "eval_every": 2, "instruments_every": 2},
        total_steps=384,
        core={"num_layers": 2, "dropout": 0.2},
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
    out["curriculum"] = train_with_curriculum(world, folder / "curriculum")
    return out


def train_with_curriculum(world: World, run: Path) -> dict[str, Any]:
    """A run that is resumed whenever a stage has opened, while levels that were drawn before are still to be played."""
    config, record, rows = CONFIG.replace(env={"num_envs": 3}), Record(), list[dict[str, float]]()
    how: dict[str, Any] = {"callbacks": [record], "world": world}
    while len(rows) < config.num_iterations // world.size:
        with Trainer.resume(run, **how) if rows else Trainer(config, run, **how) as trainer:
            for report in trainer:
                rows.append(timeless(report.row()))
                if any("is open" in note for note in report.notes):
                    break
    return {"rows": rows, "episodes": [[astuple(episode) for episode in row] for row in record.iterations]}
