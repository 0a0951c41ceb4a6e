"""Run folders made of plain numbers: nothing is trained for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs_for_tests import tiny

from ppo_tbptt.config import Config

SECONDS = 36.0  # of one iteration, so that a hundred of them are an hour


def make_run(path: Path, held_out: Mapping[int, float], config: Config | None = None, **figures: float) -> Path:
    """A run whose iteration ``i`` is at ``100 * i`` steps, to the last key of ``held_out``: success by iteration.

    ``figures`` go into every row of metrics, and override what stands there.
    """
    path.mkdir(parents=True)
    (path / "config.toml").write_text((config or tiny()).to_toml())
    rows = []
    for i in range(1, max(held_out) + 1):
        row = {"iteration": i, "env_steps": 100 * i, "time/iteration_seconds": SECONDS, "time/steps_per_second": 50.0}
        row |= {"episode/success": i / 100, **figures}
        if i in held_out:
            row |= {"eval/success": held_out[i], "time/evaluation_seconds": SECONDS}
        rows.append(json.dumps(row) + "\n")
    (path / "metrics.jsonl").write_text("".join(rows))
    return path


def add_evaluation(run: Path, name: str, env_steps: int, mean: float, **changes: Any) -> Path:
    """A file as ``evaluate`` writes it, by the published protocol but for ``changes``."""
    file = run / "evaluations" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = {
        "checkpoint": f"{run}/checkpoints/{name}.pt",
        "env_steps": env_steps,
        "env_id": "ppo_tbptt/PocMemory-v0",
        "episodes": 150,
        "seeds": list(range(200_000, 200_050)),
        "repeats": 3,
        "greedy": False,
        "sampling_seed": 0,
        "max_steps": 16_384,
        "forget_every": None,
        "capped": 0,
        "headline": "success",
        "measures": {"success": {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}},
        "per_episode": [],
    }
    file.write_text(json.dumps(tree | changes))
    return file
