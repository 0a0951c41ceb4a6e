"""One trial of ``tune``: train, tell every evaluation to the study, and stop early where it says so."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ppo_tbptt.commands.results import save_result
from ppo_tbptt.commands.side_by_side import Ask
from ppo_tbptt.commands.stop import Stop
from ppo_tbptt.commands.train_run import plan_of
from ppo_tbptt.config import Config
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer


def work(message: Sequence[Any], stop: Stop, ask: Ask) -> int:
    """Train the run in the folder ``message[0]`` by the config ``message[1]``, or go on with it.

    ``ask`` gets ``[env_steps, value]`` of every evaluation before the end, also of those before an interruption, and
    answers whether the trial is pruned. A run that ends, is pruned or is stopped leaves a checkpoint; one that ends is
    evaluated once more, with intervals.

    Returns:
        The exit code: 0 where it ended or was pruned.
    """
    path, config = Path(message[0]), Config.from_dict(message[1])
    run, plan = RunDir(path), plan_of(path, go_on=True)
    if plan == "print":
        return 0
    make = partial(Trainer.resume, path) if plan == "resume" else partial(Trainer, config, path)
    with make() as trainer:
        tag = f"eval/{trainer.envs.spec.headline}"
        for env_steps, scalars in _reports(trainer, run):
            if env_steps >= config.total_steps:
                break
            pruned = tag in scalars and ask([env_steps, scalars[tag]])
            if pruned or stop.code():
                trainer.save()
                return 0 if pruned else stop.code()
        checkpoint = run.checkpoint(trainer.iteration)
        save_result(run.evaluations / "final.json", asdict(trainer.evaluate()), checkpoint, trainer.env_steps)
    return 0


def _reports(trainer: Trainer, run: RunDir) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield steps and figures of all iterations, those of a resumed run's metrics first."""
    if trainer.iteration:
        yield from ((int(row["env_steps"]), row) for row in read_metrics(run.metrics))
    yield from ((report.env_steps, report.scalars) for report in trainer)
