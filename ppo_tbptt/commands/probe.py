"""``probe``: evaluate an agent with its recurrent state disturbed, or measure how far its gradients reach."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ppo_tbptt.analysis.gradients import GradientProbe, probe_gradients
from ppo_tbptt.analysis.probe import ProbeResult, draw_probe, probe_memory
from ppo_tbptt.commands.console import interval, say
from ppo_tbptt.commands.parser import FIGURES, Parser, UsageError, check_target
from ppo_tbptt.commands.results import add_level_options, default_path, evaluate_with_progress, load_agent, save_result
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.config import EnvConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.ppo.instruments import VANISHED
from ppo_tbptt.run.files import replacing
from ppo_tbptt.training.instruments import draw_gradients


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "probe",
        "Does an agent use its memory? It plays held-out levels with its recurrent state as it is, wiped every 1, 2, "
        "4, ... steps, exchanged with other episodes' at every step, and with noise on it.",
        "Table, JSON and figure; of a run they go to its evaluations/, of an agent to the current folder. --env.* "
        "changes the task, as for evaluate.",
    )
    add_level_options(parser)
    gradients = "measure on one rollout how far back the loss's gradients reach, saturated gates and the state's norm"
    parser.option("--gradients", action="store_true", help=gradients)
    parser.option("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.option("--out", type=Path, metavar="FIGURE", help="draw the figure there (.png, .svg or .pdf)")
    args, overrides = parser.parse_with_overrides(argv, only="env.")
    check_target("--json", args.json)
    check_target("--out", args.out, FIGURES)
    for option in ("repeats", "greedy", "max_steps") if args.gradients else ():
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise UsageError(f"--{name}: not with --gradients, which plays one rollout as in training; leave it out")
    console = Console(markup=False, emoji=False)
    policy, checkpoint, env, protocol = load_agent(args, overrides, console)
    if not policy.agent.core.state_size:
        raise UsageError(f"{args.path}: this agent has no memory to probe (core.kind = 'none')")
    if args.gradients:
        return _gradients(args, overrides, policy, checkpoint, env, protocol, console)
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
    _print(result, policy.env_steps, console)
    title = f"{env.id}: memory of the {policy.config.core.kind} agent, {len(protocol['seeds'])} levels"
    draw = partial(draw_probe, result, title=title, top=policy.spec.headline_max)
    _save(args, default, result, draw, checkpoint, policy.env_steps, console)
    return 0


def _gradients(
    args: Namespace,
    overrides: Mapping[str, str],
    policy: Policy,
    checkpoint: Path,
    env: EnvConfig,
    protocol: Mapping[str, Any],
    console: Console,
) -> int:
    """Do what ``--gradients`` asks for."""
    how = {name: protocol[name] for name in ("seeds", "sampling_seed", "num_workers")}
    result = probe_gradients(policy, env, **how)
    default = None if overrides else default_path(checkpoint, protocol)
    if default is not None:
        # In a folder of their own, because what lies in evaluations/ itself is read as evaluations.
        seeds = f"levels{min(result.seeds)}-{max(result.seeds)}_sampling{result.sampling_seed}"
        default = default.parent / "gradients" / f"{default.name.rpartition('_levels')[0]}_{seeds}.json"
        default.parent.mkdir(parents=True, exist_ok=True)
    _print_gradients(result, policy.env_steps, console)
    title = f"{env.id}: the {policy.config.core.kind} agent after {policy.env_steps:,} steps"
    draw = partial(draw_gradients, torch.tensor(result.gradient_norms), title=title)
    _save(args, default, result, draw, checkpoint, policy.env_steps, console)
    return 0


def _print_gradients(result: GradientProbe, env_steps: int, console: Console) -> None:
    norms, reach = result.gradient_norms, result.gradient_horizon
    say(
        console,
        f"\n{result.env_id} after {env_steps:,} steps: {result.rollout_steps} steps of {result.num_envs} environments "
        f"on {len(result.seeds)} level seeds",
    )
    table = Table(box=None, padding=(0, 2))
    table.add_column("steps back", justify="right")
    table.add_column("gradient's norm, 1 at 0", justify="right")
    last = len(norms) - 1
    for k in sorted({0, last, *(2**i for i in range(last.bit_length()))}):
        table.add_row(f"{k}", f"{norms[k]:.3g}")
    console.print(table)
    longest = f"the longest sequence has {len(norms)} steps"
    vanished = f"it is under {VANISHED:.0%} from {reach} steps on" if reach < len(norms) else "it never vanishes"
    say(console, f"gradient horizon {reach}: {vanished} ({longest})")
    if result.saturation:
        layers = ", ".join(f"{share:.1%}" for share in result.saturation)
        say(console, f"saturated gates, by layer: {layers}")
    say(console, f"mean norm of the state: {result.state_norm:.3g}")


def _save(
    args: Namespace,
    default: Path | None,
    result: ProbeResult | GradientProbe,
    draw: Callable[[], Figure],
    checkpoint: Path,
    env_steps: int,
    console: Console,
) -> None:
    """Write the JSON and the figure to where the options say, else to ``default`` and beside it."""
    data, picture = args.json or default, args.out or (default and default.with_suffix(".png"))
    if data is not None:
        save_result(data, result.to_dict(), checkpoint, env_steps)
        say(console, f"written to {data}")
    if picture is not None:
        drawing = draw()
        with replacing(picture) as file:
            drawing.savefig(file, format=picture.suffix[1:].lower())
        say(console, f"figure: {picture}")


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
