"""``evaluate``: play held-out level seeds with a checkpoint, or with all that a run has kept."""

from pathlib import Path
from typing import Any

from rich.console import Console

from ppo_tbptt.commands import levels
from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.evaluate_all import evaluate_all
from ppo_tbptt.commands.parser import Parser, check_target, env_overrides, positive
from ppo_tbptt.commands.results import default_path, evaluate_with_progress, print_evaluation, save_result
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import TrainConfig
from ppo_tbptt.evaluation.evaluate import evaluate


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "evaluate",
        "Play held-out level seeds with a trained agent; by default as its run evaluates (train.eval_*).",
        'The task itself can be changed: --env.options.command-count "[3]".',
    )
    levels.add_options(parser)
    parser.option("--forget-every", type=positive, help="wipe the recurrent state every so many steps of an episode")
    parser.option("--json", type=Path, metavar="FILE", help="write the result there instead; with --all, all there too")
    parser.option("--all", action="store_true", help="every checkpoint that the run has kept, where not done already")
    args, rest = parser.parse_with_overrides(argv)
    check_target("--json", args.json)
    if args.all:

        def protocol(train: TrainConfig) -> dict[str, Any]:
            return {**levels.protocol(args, train), "forget_every": args.forget_every}

        return evaluate_all(args.path, protocol, env_overrides(rest), device=args.device, json_file=args.json)
    console = Console(markup=False, emoji=False)
    asked = levels.load(args, rest, console)
    with Stop(quiet=True) as stop:
        evaluation = evaluate_with_progress(
            lambda progress: evaluate(
                asked.policy.agent, asked.env, **asked.arguments, forget_every=args.forget_every, progress=progress
            ),
            "episodes",
            stop,
            console,
            total=asked.episodes,
        )
        if evaluation is None:
            return stop.code
    target = args.json or (None if asked.changed else default_path(asked.checkpoint, evaluation))
    print_evaluation(save_result(target, evaluation.to_dict(), asked.checkpoint, asked.policy.env_steps), console)
    if target is not None:
        say(console, f"written to {target}")
    return 0
