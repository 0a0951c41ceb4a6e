"""``evaluate``: a checkpoint on held-out level seeds."""

from pathlib import Path

from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError, check_target, env_overrides, positive, seed
from ppo_tbptt.commands.results import default_path, evaluate_with_progress, print_evaluation, save_evaluation
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import SEED_LIMIT
from ppo_tbptt.evaluation import evaluate
from ppo_tbptt.policy import Policy
from ppo_tbptt.run_dir import resolve_checkpoint

MAX_EPISODES = 10**6
"""All are kept until the end."""


def run(argv: list[str]) -> int:
    parser = Parser(
        "evaluate",
        "Play held-out level seeds with a trained agent; the defaults are the published protocol.",
        'The task itself can be changed: --env.options.command-count "[3]".',
    )
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint)")
    parser.option("--num-seeds", type=positive, default=50, help="number of level seeds (default 50)")
    parser.option("--first-seed", type=seed, default=200_000, help="the first of them (default 200000)")
    parser.option("--repeats", type=positive, default=3, help="episodes per level seed (default 3)")
    parser.option("--greedy", action="store_true", help="take the most probable action instead of sampling")
    parser.option("--sampling-seed", type=seed, default=0, help="of the action noise (default 0)")
    parser.option("--max-steps", type=positive, default=16_384, help="cut longer episodes (default 16384)")
    parser.option("--forget-every", type=positive, help="wipe the recurrent state every so many steps of an episode")
    parser.option("--num-workers", type=int, help="worker processes (default: one per core; 0: this process)")
    parser.option("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.option("--json", type=Path, metavar="FILE", help="write the result there too")
    args, rest = parser.parse_with_overrides(argv)
    overrides = env_overrides(rest)
    if args.num_workers is not None and args.num_workers < 0:
        raise UsageError(f"--num-workers {args.num_workers}: must be 0 or more")
    if args.json is not None:
        check_target("--json", args.json)
    if args.first_seed + args.num_seeds > SEED_LIMIT or args.num_seeds * args.repeats > MAX_EPISODES:
        raise UsageError(
            f"--num-seeds {args.num_seeds}: at most {MAX_EPISODES:,} episodes can be played, "
            f"and no level seed is above {SEED_LIMIT - 1:,}"
        )
    checkpoint = resolve_checkpoint(args.path)
    policy = Policy.load(checkpoint, device=args.device)
    env = policy.config.override(overrides).env
    seeds = range(args.first_seed, args.first_seed + args.num_seeds)
    console = Console(markup=False, emoji=False)
    if seeds.start < env.first_seed + env.num_seeds and env.first_seed < seeds.stop:
        console.print("note: these level seeds overlap the training seeds, so this is not a held-out evaluation")
    with Stop() as stop:
        evaluation = evaluate_with_progress(
            lambda progress: evaluate(
                policy.agent,
                env,
                seeds=seeds,
                repeats=args.repeats,
                greedy=args.greedy,
                sampling_seed=args.sampling_seed,
                max_steps=args.max_steps,
                forget_every=args.forget_every,
                num_workers="auto" if args.num_workers is None else args.num_workers,
                progress=progress,
            ),
            "episodes",
            stop,
            console,
            total=args.num_seeds * args.repeats,
        )
        if evaluation is None:
            return 128 + stop.signal
    target = args.json or (None if overrides else default_path(checkpoint, evaluation))
    print_evaluation(save_evaluation(target, evaluation, checkpoint, policy.env_steps), console)
    if target is not None:
        console.print(f"written to {target}", highlight=False, soft_wrap=True)
    return 0
