"""``probe``: evaluate an agent with its recurrent state disturbed."""

from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppo_tbptt.analysis.probe import ProbeResult, draw_probe, probe_memory
from ppo_tbptt.commands.console import interval, say
from ppo_tbptt.commands.parser import FIGURES, Parser, UsageError, check_target
from ppo_tbptt.commands.results import add_level_options, default_path, evaluate_with_progress, load_agent, save_result
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.run.files import replacing


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "probe",
        "Does an agent use its memory? It plays held-out levels with its recurrent state as it is, wiped every 1, 2, "
        "4, ... steps, exchanged with other episodes' at every step, and with noise on it.",
        "Table, JSON and figure; of a run they go to its evaluations/. --env.* changes the task, as for evaluate.",
    )
    add_level_options(parser)
    parser.option("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.option("--out", type=Path, metavar="FIGURE", help="draw the figure there (.png, .svg or .pdf)")
    args, overrides = parser.parse_with_overrides(argv, only="env.")
    check_target("--json", args.json)
    check_target("--out", args.out, FIGURES)
    console = Console(markup=False, emoji=False)
    policy, checkpoint, env, protocol = load_agent(args, overrides, console)
    if not policy.agent.core.state_size:
        raise UsageError(f"{args.path}: this agent has no memory to probe (core.kind = 'none')")
    with Stop(quiet=True) as stop:
        play = partial(probe_memory, policy.agent, env, **protocol)
        result = evaluate_with_progress(play, "episodes", stop, console)
        if result is None:
            say(console, "stopped; nothing was written")
            return stop.code()
    default = None if overrides else default_path(checkpoint, protocol)
    if default is not None:
        default = default.with_name(f"probe_{default.name}")
        default.parent.mkdir(exist_ok=True)
    data, figure = args.json or default, args.out or (default and default.with_suffix(".png"))
    _print(result, policy.env_steps, console)
    if data is not None:
        save_result(data, result.to_dict(), checkpoint, policy.env_steps)
        say(console, f"written to {data}")
    if figure is not None:
        title = f"{env.id}: memory of the {policy.config.core.kind} agent, {len(protocol['seeds'])} levels"
        drawing = draw_probe(result, title=title, top=policy.spec.headline_max)
        with replacing(figure) as file:
            drawing.savefig(file, format=figure.suffix[1:].lower())
        say(console, f"figure: {figure}")
    return 0


def _print(result: ProbeResult, env_steps: int, console: Console) -> None:
    intact = result.intact
    say(
        console,
        f"\n{intact.env_id} after {env_steps:,} steps: {len(intact.per_episode)} "
        f"{'greedy' if intact.greedy else 'sampled'} episodes on {len(intact.seeds)} level seeds with each state",
    )
    names = [name for name in dict.fromkeys((intact.headline, "success")) if name in intact.measures]
    table = Table(box=None, padding=(0, 2))
    table.add_column("recurrent state")
    for name in names:
        table.add_column(f"{name} [95 %]")
    for trial in result.trials:
        table.add_row(trial.label, *(interval(trial.measures[name].mean, trial.measures[name].ci95) for name in names))
    console.print(table)
    rms = f"the state's RMS is {result.state_rms:.3g}"
    say(console, f"the longest undisturbed episode has {result.longest:,} steps; {rms}")
    if capped := sum(trial.capped for trial in result.trials):
        say(console, f"{capped} episodes were cut at {intact.max_steps:,} steps")
