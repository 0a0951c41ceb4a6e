"""``train``: read the command line and the config, before torch is imported for :mod:`.train_run`."""

from pathlib import Path

from ppo_tbptt.commands.parser import CONFIG_HELP, Parser, UsageError, minutes
from ppo_tbptt.config import Config


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "train",
        "Train an agent, and evaluate it on held-out level seeds at the end.",
        "Every field of the config can be set: --ppo.learning-rate 1e-4, --core.kind lstm, --env.num-envs 8, "
        "--seed 3, --total-steps 1e6, --device cpu, ... (ppo-tbptt show --defaults lists them all).",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    parser.option("--run-dir", type=Path, help="folder of the run (default: runs/NAME_DATE-TIME)")
    parser.option("--resume", type=Path, metavar="RUN", help="go on with this run from its newest checkpoint")
    parser.option(
        "--continue",
        dest="go_on",
        action="store_true",
        help="start --run-dir, or go on with it where it is unfinished, or show its result where it is finished",
    )
    parser.option("--max-minutes", type=minutes, help="stop in time for this budget, with a checkpoint; exit code 124")
    args, overrides = parser.parse_with_overrides(argv)
    if args.resume is not None and (args.config is not None or args.run_dir is not None):
        raise UsageError("--resume takes its config and folder from the run; leave out CONFIG and --run-dir")
    if args.resume is None and args.config is None:
        raise UsageError("a CONFIG is needed, such as quickstart (or --resume RUN)")
    config = None if args.config is None else Config.load(args.config, overrides)
    from ppo_tbptt.commands.train_run import resume_or_start

    return resume_or_start(args, config, overrides)
