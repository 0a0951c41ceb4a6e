"""``tune``: read the command line and the config, before optuna is imported for :mod:`.tune_study`."""

from importlib.util import find_spec
from pathlib import Path

from ppo_tbptt.commands.parser import Parser, UsageError, integer_from, minutes, positive, seed
from ppo_tbptt.config import Config

FIRST_SEED = 300_000
"""Of the level seeds that trials are compared on; those from 200,000 on are for results that are reported."""


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "tune",
        "Search for better settings: trials with values drawn from SPACE (TPE), compared by the headline measure on "
        "held-out levels; after an eighth, a quarter and a half of the steps only the better half goes on (successive "
        "halving). The same command goes on where it was interrupted, and prints the table of a finished study.",
        "Every field of the config can be set for all trials, as for train; --seed is the search's, and that of the "
        f"trials is the config's. Level seeds are {FIRST_SEED} and following (--train.eval-first-seed sets others): "
        "those from 200000 on are for results that are reported, so trials must not be chosen by them.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a TOML file, such as configs/*.toml")
    example = '"ppo.gamma" = [0.99, 0.995], "ppo.learning_rate.initial" = { low = 1e-4, high = 3e-3, log = true }'
    parser.option("--space", type=Path, required=True, help=f"a TOML file of values or ranges by key: {example}")
    parser.option("--trials", type=positive, required=True, metavar="N", help="of the whole study, finished or pruned")
    parser.option("--minutes", type=minutes, help="stop all trials after so long, with checkpoints; exit code 124")
    parser.option("--jobs", type=integer_from(0), help="trials side by side, one thread each (default: one per core)")
    parser.option("--seed", type=seed, default=0, help="of the search (default 0)")
    prune = (
        "steps after which a trial can be pruned first, then after 2, 4, ... times as many (default: total_steps / 8)"
    )
    parser.option("--prune-from", type=positive, metavar="STEPS", help=prune)
    parser.option("--out", type=Path, default=Path("runs/tune"), help="folder of the study (default: runs/tune)")
    args, overrides = parser.parse_with_overrides(argv)
    if find_spec("optuna") is None:
        raise UsageError("tune needs optuna; install it with: pip install 'ppo-tbptt[tune]'")
    config = Config.load(args.config, {"train.eval_first_seed": str(FIRST_SEED), **overrides})
    if not config.train.eval_every:
        wrong = "train.eval_every: 0 is not allowed, as trials are compared by their evaluations"
        raise UsageError(f"{args.config}: {wrong}; must be at least 1, such as --train.eval-every 10")
    from ppo_tbptt.commands.search_space import Space, spec_of

    space, spec = Space.load(args.space, config, [*overrides]), spec_of(config)
    from ppo_tbptt.commands.tune_study import tune

    return tune(args, config, space, spec.headline)
