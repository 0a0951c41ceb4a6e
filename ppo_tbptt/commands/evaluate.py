"""``evaluate``: play held-out level seeds with a checkpoint, or with all that a run has kept."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from ppo_tbptt.commands import levels
from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.evaluate_all import evaluate_all
from ppo_tbptt.commands.parser import Parser, check_target, env_overrides, positive
from ppo_tbptt.commands.results import default_path, evaluate_with_progress, print_evaluation, save_result
from ppo_tbptt.commands.stop import Stop
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
        return evaluate_all(args, env_overrides(rest))
    console = Console(markup=False, emoji=False)
    policy, checkpoint, env, protocol = levels.load(args, rest, console)
    protocol["forget_every"] = args.forget_every
    play = partial(evaluate, policy.agent, env, **protocol)
    with Stop(quiet=True) as stop:
        total = len(protocol["seeds"]) * protocol["repeats"]
        evaluation = evaluate_with_progress(play, "episodes", stop, console, total=total)
        if evaluation is None:
            return stop.code()
    target = args.json or (None if rest else default_path(checkpoint, protocol))
    print_evaluation(save_result(target, asdict(evaluation), checkpoint, policy.env_steps), console)
    if target is not None:
        say(console, f"written to {target}")
    return 0
