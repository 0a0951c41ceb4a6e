"""Callbacks around epochs and iterations: evaluation, metrics, checkpoints, and the interface for users' own."""

import math
from collections import deque
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_tbptt.config import Config
from ppo_tbptt.config.fields import shown
from ppo_tbptt.envs import Curriculum, Episode, WorkerError
from ppo_tbptt.evaluation.evaluate import Evaluation, evaluate
from ppo_tbptt.models import Agent
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.run.tensorboard import histograms_due
from ppo_tbptt.training.report import headline
from ppo_tbptt.types import Rollout, Targets

if TYPE_CHECKING:
    from ppo_tbptt.training.trainer import Trainer


class Iteration:
    """One iteration as callbacks see it. Each rank has its own rollout; scalars and episodes are those of all ranks.

    Attributes:
        trainer: the trainer, with its agent, learner, envs and config.
        number: number of the iteration, counted from 1.
        env_steps: environment steps of the run, including this iteration.
        rollout: the rollout of this rank.
        targets: advantages and returns of that rollout.
        episodes: episodes that ended in this iteration; filled after the update.
        scalars: figures by TensorBoard tag; callbacks may add to them until the metrics are written.
        score: headline measure that decides about ``best.pt``; None where there is none.
    """

    def __init__(self, trainer: "Trainer", rollout: Rollout, targets: Targets) -> None:
        self.trainer, self.rollout, self.targets = trainer, rollout, targets
        self.number, self.env_steps = trainer.iteration + 1, trainer.env_steps + trainer.batch_size
        self.episodes: list[Episode] = []
        self.scalars: dict[str, float] = {}
        self.score: float | None = None

    @property
    def last(self) -> bool:
        """Whether this is the last iteration of the run."""
        return self.env_steps >= self.trainer.config.total_steps

    @cached_property
    def report(self) -> Report:
        """The iteration's report, fixed at the first access; it takes the trainer's notes."""
        trainer = self.trainer
        notes = (*trainer.notes, *(trainer.writer.take_notes() if trainer.writer else ()))
        trainer.notes.clear()
        return Report(iteration=self.number, env_steps=self.env_steps, scalars=dict(self.scalars), notes=notes)

    def before_epoch(self, epoch: int) -> None:
        """Call `Callback.before_epoch` of all callbacks."""
        for callback in self.trainer.callbacks:
            callback.before_epoch(self, epoch)

    def after_epoch(self, epoch: int) -> None:
        """Call `Callback.after_epoch` of all callbacks."""
        for callback in self.trainer.callbacks:
            callback.after_epoch(self, epoch)


class Callback:
    """Hooks of a training run; override those that are needed. All ranks call them in the same order.

    A callback with a ``name`` is saved in every checkpoint: ``state_dict`` returns tensors, numbers and text (or dicts
    and lists of them), and ``load_state_dict`` receives them when the run is resumed.
    """

    name = ""

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Run before each epoch of the update, counted from 0."""

    def after_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Run after each epoch; parameters still have the gradients of its last minibatch."""

    def after_iteration(self, iteration: Iteration) -> None:
        """Run after the update. The user's callbacks come after evaluation, metrics and checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def evaluate_held_out(agent: Agent, config: Config, **kwargs: Any) -> Evaluation:
    """Evaluate ``agent`` on the config's held-out level seeds; ``kwargs`` override arguments of `evaluate`."""
    train = config.train
    arguments: dict[str, Any] = {
        "seeds": range(train.eval_first_seed, train.eval_first_seed + train.eval_num_seeds),
        "repeats": train.eval_repeats,
        "greedy": train.eval_greedy,
        "max_steps": train.eval_max_steps,
        "num_workers": config.env.num_workers,
    }
    return evaluate(agent, config.env, **{**arguments, **kwargs})


class EvaluateHeldOut(Callback):
    """Evaluates on held-out levels every ``train.eval_every`` iterations: ``eval/*`` and the iteration's score."""

    def after_iteration(self, iteration: Iteration) -> None:
        """Evaluate on rank 0 and share the means with all ranks."""
        trainer, every = iteration.trainer, iteration.trainer.config.train.eval_every
        if not every or iteration.number % every:
            return
        began = perf_counter()
        measures = self._measures(trainer) if trainer.world.rank == 0 else {}
        measures = trainer.world.gather_json(measures)[0]  # the other ranks wait here
        iteration.score = measures[trainer.envs.spec.headline]
        iteration.scalars |= {f"eval/{name}": value for name, value in measures.items()}
        iteration.scalars["time/evaluation_seconds"] = perf_counter() - began

    def _measures(self, trainer: "Trainer") -> dict[str, float]:
        """Return the means over levels; repeat an evaluation whose worker failed while the fault budget lasts."""
        while True:
            try:
                return {name: estimate.mean for name, estimate in trainer.evaluate().measures.items()}
            except WorkerError as error:
                trainer.notes.append(trainer.faults.budget.spend(error, "the evaluation is done again"))


class AdvanceCurriculum(Callback):
    """Opens the curriculum's next stage when the newest is mastered, from the episodes of all ranks: ``curriculum/*``.

    The figures are those that decided: of the stages that were open in the iteration.
    """

    def after_iteration(self, iteration: Iteration) -> None:
        """Add the iteration's episodes in order of time, then environment."""
        trainer, levels = iteration.trainer, iteration.trainer.levels
        if not isinstance(levels, Curriculum):
            return
        name = trainer.envs.spec.headline
        by_time = sorted(iteration.episodes, key=lambda episode: episode.step)  # as they are by rank, then environment
        levels.add_scores((episode.stage, headline(episode, name)) for episode in by_time)
        iteration.scalars["curriculum/stage"] = float(levels.open_stages)
        if levels.score is not None:
            iteration.scalars["curriculum/headline"] = levels.score
        if levels.advance():
            stages = trainer.config.env.curriculum.stages
            text = f"curriculum: stage {levels.open_stages} of {len(stages)} is open"
            trainer.notes.append(f"{text}: {shown(stages[levels.open_stages - 1])}")


FINISH_SECONDS = 10.0
"""A run that is told to stop drops an iteration that would take longer to finish; a resumed run repeats it."""


class IterationSnapshot(Callback):
    """Keeps the state from before a long iteration, so that a run that stops may drop the iteration.

    Several ranks have to stop after the same iteration, so they keep no snapshot.
    """

    def __init__(self) -> None:
        self._seconds = {False: math.inf, True: math.inf}  # duration of the last iteration, by `_evaluating`
        self._started, self._evaluating = -math.inf, False
        self._state: dict[str, Any] | None = None

    def take(self, trainer: "Trainer") -> None:
        """Take the time of an iteration, and a snapshot where it is expected to be long."""
        every = trainer.config.train.eval_every
        self._started, self._evaluating = perf_counter(), bool(every) and (trainer.iteration + 1) % every == 0
        if trainer.writer is not None and trainer.world.size == 1 and self._seconds[self._evaluating] > FINISH_SECONDS:
            self._state = deepcopy(trainer.state_dict())

    def discard(self) -> None:
        """Discard the snapshot: the iteration can no longer be dropped."""
        self._state = None

    def after_iteration(self, iteration: Iteration) -> None:
        """Note how long the iteration took and discard its snapshot."""
        self._seconds[self._evaluating] = perf_counter() - self._started
        self.discard()

    def may_drop(self) -> bool:
        """Return whether the iteration may be dropped now: there is a snapshot, and much of the iteration is left."""
        left = self._started + self._seconds[self._evaluating] - perf_counter()
        return self._state is not None and left > FINISH_SECONDS

    def save(self, trainer: "Trainer") -> Path | None:
        """Write the snapshot as a checkpoint after an iteration was dropped. The trainer can't train any further.

        Returns:
            The checkpoint's path, or None where it can't be written.
        """
        assert trainer.run is not None and trainer.writer is not None and self._state is not None
        iteration = self._state["iteration"]
        if trainer.writer.saved == iteration or trainer.writer.save(iteration, self._state):
            return trainer.run.checkpoint(iteration)
        return None


class WriteMetrics(Callback):
    """Writes the report to ``metrics.jsonl`` and TensorBoard, with histograms now and then."""

    def after_iteration(self, iteration: Iteration) -> None:
        """Write the iteration's report."""
        writer, rollout = iteration.trainer.writer, iteration.rollout
        if writer is None:
            return
        writer.report(iteration.report)
        if histograms_due(iteration.number, iteration.trainer.num_iterations):
            tensors = {"state": rollout.state.kept(), "value": rollout.value, "advantage": iteration.targets.advantage}
            writer.write_tensorboard(lambda board: board.histograms(tensors, iteration.env_steps))


class SaveCheckpoints(Callback):
    """Writes ``best.pt`` when the score rises, and periodic checkpoints by iterations and by the clock.

    Without evaluations the score is the mean headline measure of the last 100 training episodes, computed whenever a
    checkpoint is due.
    """

    name = "best"

    def __init__(self) -> None:
        self.best: float | None = None
        self.recent: deque[float] = deque(maxlen=100)

    def after_iteration(self, iteration: Iteration) -> None:
        """Write the checkpoints that are due."""
        trainer, train = iteration.trainer, iteration.trainer.config.train
        self.recent.extend(headline(episode, trainer.envs.spec.headline) for episode in iteration.episodes)
        if trainer.run is None:
            return
        due = iteration.number % train.checkpoint_every == 0 or iteration.last
        if due and not train.eval_every and len(self.recent) == self.recent.maxlen:
            iteration.score = float(np.mean(self.recent))
        if iteration.score is not None:
            self._save_best(trainer, iteration.score)
        if iteration.last:
            tree = trainer.state_dict()
            if trainer.writer is not None:
                trainer.writer.save_final(iteration.number, tree)
        elif due or trainer.world.largest(int(trainer.writer is not None and trainer.writer.checkpoint_due())):
            self.save(trainer)

    def _save_best(self, trainer: "Trainer", score: float) -> None:
        if self.best is not None and score <= self.best:
            return
        before, self.best = self.best, score
        tree = trainer.state_dict()
        if not _on_rank_0(trainer, lambda writer: writer.save_best(tree)):
            self.best = before

    def save(self, trainer: "Trainer") -> Path | None:
        """Write a checkpoint unless there is one of this iteration; see `Trainer.save`."""
        if trainer.run is None:
            return None
        if not _on_rank_0(trainer, lambda writer: writer.saved == trainer.iteration):
            tree = trainer.state_dict()
            if not _on_rank_0(trainer, lambda writer: writer.save(trainer.iteration, tree)):
                return None
        return trainer.run.checkpoint(trainer.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score and the recent training scores."""
        return {"best": self.best, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scores; other keys of ``state`` are ignored."""
        self.best = state["best"]
        self.recent.extend(state["recent"])


def _on_rank_0(trainer: "Trainer", write: Callable[[RunWriter], bool]) -> bool:
    """Call ``write`` on rank 0 and return its result on every rank."""
    return trainer.world.gather_json(trainer.writer is None or write(trainer.writer))[0]
