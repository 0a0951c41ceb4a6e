"""``benchmark``: how fast training is on this machine, and how fast it could be."""

import json
import shlex
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ppo_tbptt.benchmark.cores import BASE, measure_cores
from ppo_tbptt.benchmark.measure import MAX_EXTRA_ITERATIONS, Setting, compare, describe, measure, write_profile
from ppo_tbptt.commands.console import wide_console
from ppo_tbptt.commands.parser import CONFIG_HELP, Parser, UsageError, check_target, positive, split_overrides
from ppo_tbptt.config import SEED_LIMIT, Config
from ppo_tbptt.config.fields import shown
from ppo_tbptt.training.trainer import Trainer

COMPUTED = "computed / counted steps"
"""Shown only where they are not the same."""


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    if "--vs" in argv[:-1]:  # joined, for argparse would take a value that starts with dashes for an option
        at = argv.index("--vs")
        argv = [*argv[:at], f"--vs={argv[at + 1]}", *argv[at + 2 :]]
    args, overrides = _parser().parse_with_overrides(argv)
    others, second = split_overrides(args.vs or [], {})
    if others:
        raise UsageError(f"--vs: {shown(others[0])} is not expected; must be --key value, or --key=value")
    variants = [{}] if args.vs is None else [{}, second]
    check_target("--profile", args.profile, [".json", ".json.gz"])
    base = Config.load(args.config, overrides)
    if args.cores:
        return _run_cores(args, base, overrides)
    configs = [base.override(extra) for extra in variants]
    with ExitStack() as stack:
        settings = []
        for config, extra in zip(configs, variants, strict=True):
            least = (args.warmup + args.iterations + MAX_EXTRA_ITERATIONS) * config.batch_size
            never = {"eval_every": SEED_LIMIT}  # in so few iterations; with a curriculum 0 is refused
            long_enough = config.replace(total_steps=max(config.total_steps, least), train=never)
            trainer = stack.enter_context(Trainer(long_enough))
            settings.append(Setting(trainer=trainer, source=str(args.config), overrides={**overrides, **extra}))
        status = stack.enter_context(_progress().status("starting"))
        measure(settings, args.warmup, args.iterations, status.update)
        if args.profile is not None:
            write_profile(settings[0].trainer, args.profile)
        results = [describe(setting, status.update) for setting in settings]
    result = results[0] | ({"vs": results[1], **compare(*settings)} if len(results) > 1 else {})
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print(result, Console(markup=False, emoji=False))
    return 0


def _progress() -> Console:
    return Console(stderr=True, markup=False, emoji=False)


def _run_cores(args: Namespace, config: Config, overrides: dict[str, str]) -> int:
    """Time the cores, and print what came of it."""
    for option, value in {"--vs": args.vs, "--profile": args.profile}.items():
        if value is not None:
            raise UsageError(f"--cores: times the cores alone, in turn; must be without {option}")
    if "core.kind" in overrides:
        raise UsageError(f"--core.kind {overrides['core.kind']}: must not be given with --cores, which times them all")
    with _progress().status("starting") as status:
        result = measure_cores(config, args.warmup, args.iterations, status.update)
    result["config"] = {"source": str(args.config), "overrides": overrides}
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print_cores(result, wide_console())
    return 0


def _print_cores(result: dict[str, Any], console: Console) -> None:
    names = ["projection", "acting", *(f"update_{length}" for length in result["lengths"])]
    table = Table("core", "weights", "state", *(name.replace("_", " ") for name in names), box=None, padding=(0, 2))
    for kind, of in result["cores"].items():
        cells = [f"{_seconds(of[name]['seconds'])} ({of[name]['ratio']:.2f})" for name in names]
        table.add_row(kind, f"{of['parameters']:,}", f"{of['state_size']:,}", *cells)
    console.print(table, highlight=False)
    console.print(
        f"{result['device']}, {result['precision']}, {result['threads']} threads; hidden size {result['output_size']}. "
        f"Projection of {result['steps']:,} inputs of {result['input_size']} features, forward and backward, all of "
        "them distinct; the others begin with projected inputs. Acting: a step of "
        f"{result['environments']} environments. Update: forward and backward through about {result['steps']:,} steps "
        f"in sequences of so many. In brackets: times as fast as {BASE}, in turn.",
        highlight=False,
        soft_wrap=True,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _parser() -> Parser:
    parser = Parser(
        "benchmark",
        "Time whole training iterations, their parts, and what this machine would allow.",
        "Every field of the config can be set, as for train.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help=CONFIG_HELP)
    parser.option("--json", action="store_true", help="print JSON and nothing else")
    parser.option("--iterations", type=positive, default=5, help="iterations, or turns of a core, to time (default 5)")
    parser.option("--warmup", type=positive, default=2, help="those before, not timed (default 2)")
    parser.option(
        "--vs", type=shlex.split, metavar="OVERRIDES", help='a second setting, in turn: "--core.kind lstm --seed 2"'
    )
    parser.option("--cores", action="store_true", help="every recurrent core alone, acting and in updates, against gru")
    parser.option("--profile", type=Path, metavar="FILE", help="write a trace of one iteration (.json or .json.gz)")
    return parser


def _print(result: dict[str, Any], console: Console) -> None:
    columns = [result, result["vs"]] if "vs" in result else [result]
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name in _rows(result):
        if name != COMPUTED or any(column["computed_over_counted"] != 1 for column in columns):
            table.add_row(name, *(_rows(column)[name] for column in columns))
    console.print(table, highlight=False)
    if "vs" in result:
        low, high = result["ratio_spread"]
        console.print(
            f"the second ({_difference(result['vs'], result)}) is {result['ratio']:.3f} times as fast as the first "
            f"(neighbours: {low:.3f} to {high:.3f})",
            highlight=False,
            soft_wrap=True,
        )


def _difference(result: dict[str, Any], base: dict[str, Any]) -> str:
    """The second setting's own overrides, as they are typed."""
    known = base["config"]["overrides"].items()
    own = [f"--{key} {value}" for key, value in result["config"]["overrides"].items() if (key, value) not in known]
    return " ".join(own) or "the same again"


def _rows(result: dict[str, Any]) -> dict[str, str]:
    """What a person reads, by name."""
    low, high = result["spread"]
    total = sum(result["seconds"].values())
    memory, peak, padded = result["peak_memory_mb"], result["peak_flops"], result["padded_over_valid_if_padded"]
    on_device = "" if memory["device"] is None else f", device {memory['device']:,.0f} MB"
    return {
        "device": result["device"],
        "precision, threads": f"{result['precision']}, {result['threads']}",
        "environments": result["environments"],
        "steps per second": f"{result['steps_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
        "of the ceiling": f"{result['fraction_of_ceiling']:.3f} of {result['ceiling_steps_per_second']:,.0f}",
        **{
            f"  ceiling: {part}": f"{seconds:.3f} s ({seconds / total:.1%})"
            for part, seconds in result["ceiling_seconds"].items()
        },
        "iteration": f"{total:.3f} s, {result['steps_per_iteration']:,} steps",
        **{f"  {part}": f"{seconds:.3f} s ({seconds / total:.1%})" for part, seconds in result["seconds"].items()},
        "distinct frames": "none" if result["distinct_fraction"] is None else f"{result['distinct_fraction']:.1%}",
        COMPUTED: f"{result['computed_over_counted']:.3f}, burn-in included",
        "padded / valid steps": f"{result['padded_over_valid']:.3f} in the core ({padded:.3f} if it padded)",
        "peak memory": f"{memory['host']:,.0f} MB{on_device}",
        "arithmetic": f"{result['flop_per_step'] / 1e6:,.3g} MFLOP per step",
        "of the device's peak": f"{result['fraction_of_peak']:.3f}",
        "  matrix products": f"{peak['matmul'] / 1e12:.3g} TFLOP/s",
        "  convolutions": f"{peak['conv'] / 1e12:.3g} TFLOP/s",
    }
