"""What ``evaluate`` and ``probe`` have in common: a trained agent, and the level seeds that it plays."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError, env_overrides, positive, seed
from ppo_tbptt.commands.results import note_overlap
from ppo_tbptt.config import SEED_LIMIT, EnvConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.folder import resolve_checkpoint

MAX_EPISODES = 10**6
"""All are kept until the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What a command line asks to be played."""

    checkpoint: Path
    policy: Policy
    env: EnvConfig
    changed: bool
    """Whether it is another task than the agent was trained on."""
    arguments: dict[str, Any]
    """The keyword arguments of :func:`~ppo_tbptt.evaluation.evaluate.evaluate` for it."""

    @property
    def episodes(self) -> int:
        return len(self.arguments["seeds"]) * self.arguments["repeats"]


def add_options(parser: Parser) -> None:
    """The path, and everything that :func:`load` wants to know."""
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint)")
    parser.option("--num-seeds", type=positive, default=50, help="number of level seeds (default 50)")
    parser.option("--first-seed", type=seed, default=200_000, help="the first of them (default 200000)")
    parser.option("--repeats", type=positive, default=3, help="episodes per level seed (default 3)")
    parser.option("--greedy", action="store_true", help="take the most probable action instead of sampling")
    parser.option("--sampling-seed", type=seed, default=0, help="of the action noise (default 0)")
    parser.option("--max-steps", type=positive, default=16_384, help="cut longer episodes (default 16384)")
    parser.option("--num-workers", type=int, help="worker processes (default: one per core; 0: this process)")
    parser.option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of :func:`~ppo_tbptt.evaluation.evaluate.evaluate`.

    Raises:
        UsageError: a number that can't be.
    """
    if args.num_workers is not None and args.num_workers < 0:
        raise UsageError(f"--num-workers {args.num_workers}: must be 0 or more")
    if args.first_seed + args.num_seeds > SEED_LIMIT or args.num_seeds * args.repeats > MAX_EPISODES:
        raise UsageError(
            f"--num-seeds {args.num_seeds}: at most {MAX_EPISODES:,} episodes can be played, "
            f"and no level seed is above {SEED_LIMIT - 1:,}"
        )
    return {
        "seeds": range(args.first_seed, args.first_seed + args.num_seeds),
        "repeats": args.repeats,
        "greedy": args.greedy,
        "sampling_seed": args.sampling_seed,
        "max_steps": args.max_steps,
        "num_workers": "auto" if args.num_workers is None else args.num_workers,
    }


def load(args: argparse.Namespace, rest: list[str], console: Console) -> Levels:
    """The agent and its task; says so where the levels are none that were held out.

    Raises:
        UsageError, ConfigError, CheckpointError, RunDirError, DeviceError: see there.
    """
    overrides, arguments = env_overrides(rest), protocol(args)
    checkpoint = resolve_checkpoint(args.path)
    policy = Policy.load(checkpoint, device=args.device)
    env = policy.config.override(overrides).env
    note_overlap(env, arguments["seeds"], console)
    return Levels(checkpoint=checkpoint, policy=policy, env=env, changed=bool(overrides), arguments=arguments)
