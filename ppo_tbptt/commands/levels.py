"""What ``evaluate`` and ``probe`` share: a trained agent, the level seeds that it plays, and how."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError, env_overrides, positive, seed
from ppo_tbptt.commands.results import note_overlap
from ppo_tbptt.config import SEED_LIMIT, EnvConfig, TrainConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.folder import resolve_checkpoint

MAX_EPISODES = 10**6
"""All are kept until the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """A trained agent, its task, and how it is to play it."""

    checkpoint: Path
    policy: Policy
    env: EnvConfig
    changed: bool
    """Whether ``env`` is another task than the agent was trained on."""
    arguments: dict[str, Any]
    """Keyword arguments of :func:`~ppo_tbptt.evaluation.evaluate.evaluate`."""

    @property
    def episodes(self) -> int:
        """Number of episodes that will be played."""
        return len(self.arguments["seeds"]) * self.arguments["repeats"]


def add_options(parser: Parser) -> None:
    """Add the path, and the options that :func:`load` reads. What is not given is as the run itself evaluates."""
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint)")
    parser.option("--num-seeds", type=positive, help="number of level seeds (default: the run's train.eval_num_seeds)")
    parser.option("--first-seed", type=seed, help="the first of them (default: train.eval_first_seed)")
    parser.option("--repeats", type=positive, help="episodes per level seed (default: train.eval_repeats)")
    parser.option(
        "--greedy",
        action="store_true",
        default=None,
        help="take the most probable actions (default: train.eval_greedy)",
    )
    parser.option("--sampled", dest="greedy", action="store_false", default=None, help="sample actions")
    parser.option("--sampling-seed", type=seed, default=0, help="of the action noise (default 0)")
    parser.option("--max-steps", type=positive, help="truncate longer episodes (default: train.eval_max_steps)")
    parser.option("--num-workers", type=int, help="worker processes (default: one per core; 0: this process)")
    parser.option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def protocol(args: argparse.Namespace, train: TrainConfig) -> dict[str, Any]:
    """Return keyword arguments of ``evaluate``: from ``args``, and where not given there from ``train``.

    Raises:
        UsageError: a number is out of range.
    """
    if args.num_workers is not None and args.num_workers < 0:
        raise UsageError(f"--num-workers {args.num_workers}: must be 0 or more")
    first, number, repeats, greedy, max_steps = (
        getattr(train, f"eval_{name}") if getattr(args, name) is None else getattr(args, name)
        for name in ("first_seed", "num_seeds", "repeats", "greedy", "max_steps")
    )
    if first + number > SEED_LIMIT or number * repeats > MAX_EPISODES:
        raise UsageError(
            f"--num-seeds {number}: at most {MAX_EPISODES:,} episodes can be played, "
            f"and no level seed is above {SEED_LIMIT - 1:,}"
        )
    return {
        "seeds": range(first, first + number),
        "repeats": repeats,
        "greedy": greedy,
        "sampling_seed": args.sampling_seed,
        "max_steps": max_steps,
        "num_workers": "auto" if args.num_workers is None else args.num_workers,
    }


def load(args: argparse.Namespace, rest: list[str], console: Console) -> Levels:
    """Load the agent and its task, and tell the user where the levels are not held out.

    Raises:
        UsageError, ConfigError, CheckpointError, RunDirError, DeviceError: see there.
    """
    overrides = env_overrides(rest)
    checkpoint = resolve_checkpoint(args.path)
    policy = Policy.load(checkpoint, device=args.device)
    arguments = protocol(args, policy.config.train)
    env = policy.config.override(overrides).env
    note_overlap(env, arguments["seeds"], console)
    return Levels(checkpoint=checkpoint, policy=policy, env=env, changed=bool(overrides), arguments=arguments)
