"""``plot``: draw the learning curves of runs."""

from pathlib import Path

from ppo_tbptt.analysis.groups import by_task, group_runs
from ppo_tbptt.analysis.runs import read_runs
from ppo_tbptt.commands.console import say, wide_console
from ppo_tbptt.commands.parser import FIGURES, RUN_HELP, Parser, check_target
from ppo_tbptt.run.files import replacing


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "plot", "Learning curves over steps and hours, with intervals, and the published ones where the task is theirs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN_HELP)
    parser.option("--out", type=Path, required=True, metavar="FIG", help="the picture: .png, .svg or .pdf")
    args = parser.parse_args(argv)
    check_target("--out", args.out, FIGURES)
    groups = group_runs(read_runs(args.runs))

    from ppo_tbptt.analysis.figures import learning_curves, save  # here, because matplotlib is slow to import

    figure = learning_curves(by_task(groups))
    with replacing(args.out) as file:
        save(figure, file, args.out.suffix[1:].lower())
    say(wide_console(), f"written to {args.out}")
    return 0
