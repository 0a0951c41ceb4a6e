"""What ``evaluate`` and ``probe`` share: a trained agent, the level seeds that it plays, and how."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.parser import Parser, UsageError, env_overrides, integer_from, positive, seed
from ppo_tbptt.config import SEED_LIMIT, Config, EnvConfig
from ppo_tbptt.evaluation.policy import Policy

MAX_EPISODES = 10**6
"""All are kept until the end."""


def add_options(parser: Parser) -> None:
    """Add the path, and the options that :func:`protocol` reads. What is not given is as the run itself evaluates."""
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
    workers = "worker processes (default: one per core; 0: this process)"
    parser.option("--num-workers", type=integer_from(0), help=workers)
    parser.option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")


def protocol(args: Namespace, config: Config, console: Console) -> dict[str, Any]:
    """Return keyword arguments of :func:`~ppo_tbptt.evaluation.evaluate.evaluate`: from ``args``, else from ``config``.

    Tells the user where the levels are not held out.

    Raises:
        UsageError: too many episodes, or a level seed that is too large.
    """
    first, number, repeats, greedy, max_steps = (
        getattr(config.train, f"eval_{name}") if getattr(args, name) is None else getattr(args, name)
        for name in ("first_seed", "num_seeds", "repeats", "greedy", "max_steps")
    )
    if first + number > SEED_LIMIT or number * repeats > MAX_EPISODES:
        raise UsageError(
            f"--num-seeds {number}: at most {MAX_EPISODES:,} episodes can be played, "
            f"and no level seed is above {SEED_LIMIT - 1:,}"
        )
    if first < config.env.first_seed + config.env.num_seeds and config.env.first_seed < first + number:
        say(console, "note: these level seeds overlap the training seeds, so this is not a held-out evaluation")
    return {
        "seeds": range(first, first + number),
        "repeats": repeats,
        "greedy": greedy,
        "sampling_seed": args.sampling_seed,
        "max_steps": max_steps,
        "num_workers": "auto" if args.num_workers is None else args.num_workers,
    }


def load(args: Namespace, rest: list[str], console: Console) -> tuple[Policy, Path, EnvConfig, dict[str, Any]]:
    """Load the agent. Return it, the file it was in, the task that it is to play, and the :func:`protocol`.

    Raises:
        UsageError, ConfigError, CheckpointError, RunDirError, DeviceError: see there.
    """
    overrides = env_overrides(rest)
    policy = Policy.load(args.path, device=args.device)
    assert policy.path is not None
    config = policy.config.override(overrides)
    return policy, policy.path, config.env, protocol(args, config, console)
