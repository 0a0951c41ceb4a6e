"""``soak``: train for long and watch memory, files, threads, processes and speed."""

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from ppo_tbptt.benchmark.soak import Sample, problems, soak
from ppo_tbptt.commands.parser import Parser, minutes
from ppo_tbptt.config import Config


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        "soak",
        "Train for long and watch memory, files, threads, processes and speed; exit code 1 if any went wrong.",
        "Every field of the config can be set, as for train.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="such as configs/toy_poc_memory.toml")
    parser.option("--minutes", type=minutes, default=30.0, help="for how long (default 30)")
    args, overrides = parser.parse_with_overrides(argv)
    config = Config.load(args.config, {"total_steps": "1e12", **overrides})
    console = Console(width=100, highlight=False, markup=False, emoji=False)
    samples: list[Sample] = []
    with TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        for sample in soak(config, run_dir, minutes=args.minutes, seconds_between=max(1.0, args.minutes / 2)):
            samples.append(sample)
            if len(samples) % 10 == 1:
                console.print(_line(sample))
        found = problems(samples, run_dir / "metrics.jsonl")
    console.print(_line(samples[-1]))
    for line in found or ["nothing grew, nothing slowed down, and the metrics are whole"]:
        console.print(line)
    return 1 if found else 0


def _line(s: Sample) -> str:
    counts = f"{s.files:>4} files  {s.threads:>3} threads  {s.processes:>2} processes"
    return f"{s.minutes:>6.1f} min  {s.memory_mb:>8.1f} MB  {counts}  {s.steps_per_second:>8,.0f} steps/s"
