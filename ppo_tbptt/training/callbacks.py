"""What happens around an update and between iterations: evaluation, metrics, checkpoints, and what users add."""

import math
from collections import deque
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ppo_tbptt.envs import Episode, WorkerError
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.tensorboard import histograms_due
from ppo_tbptt.training.report import headline
from ppo_tbptt.types import Rollout, Targets

if TYPE_CHECKING:
    from ppo_tbptt.training.trainer import Trainer


class Iteration:
    """One iteration as callbacks see it. On several ranks each has its own rollout, and all have the same scalars.

    trainer: with its agent, learner, envs and config.  number: from 1 on.
    env_steps: environment steps of the run, those of this iteration included.
    rollout, targets: what the update learns from.
    episodes: those that ended in this iteration, of all ranks; known after the update.
    scalars: by TensorBoard tag; what is added until the metrics are written is in them.
    score: the headline measure of a held-out evaluation, where there was one.
    """

    def __init__(self, trainer: "Trainer", rollout: Rollout, targets: Targets) -> None:
        self.trainer, self.rollout, self.targets = trainer, rollout, targets
        self.number, self.env_steps = trainer.iteration + 1, trainer.env_steps + trainer.batch_size
        self.episodes: list[Episode] = []
        self.scalars: dict[str, float] = {}
        self.score: float | None = None

    @property
    def last(self) -> bool:
        """Whether the run is finished."""
        return self.env_steps >= self.trainer.config.total_steps

    @cached_property
    def report(self) -> Report:
        """What is written and returned; fixed when it is first asked for."""
        notes = self.trainer.take_notes()
        return Report(iteration=self.number, env_steps=self.env_steps, scalars=dict(self.scalars), notes=notes)

    def before_epoch(self, epoch: int) -> None:
        for callback in self.trainer.callbacks:
            callback.before_epoch(self, epoch)

    def after_epoch(self, epoch: int) -> None:
        for callback in self.trainer.callbacks:
            callback.after_epoch(self, epoch)


class Callback:
    """Hooks of a training run; override what is needed. All ranks call them in the same order.

    A callback whose ``name`` is not empty is part of every checkpoint: ``state_dict`` returns tensors, numbers and text
    (or dicts and lists of them), and ``load_state_dict`` gets them back when the run is resumed.
    """

    name = ""

    def before_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Called before each pass over the rollout, from epoch 0 on; scalars added here are in the metrics."""

    def after_epoch(self, iteration: Iteration, epoch: int) -> None:
        """Called after each pass over the rollout, with the gradients of its last minibatch still there."""

    def after_iteration(self, iteration: Iteration) -> None:
        """Called when an iteration is done: held-out evaluation first, then metrics, best and periodic checkpoints,
        then the user's callbacks in their order."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class EvaluateHeldOut(Callback):
    """Evaluate on held-out levels every ``train.eval_every`` iterations: ``eval/*`` and the iteration's score."""

    def after_iteration(self, iteration: Iteration) -> None:
        trainer, every = iteration.trainer, iteration.trainer.config.train.eval_every
        if not every or iteration.number % every:
            return
        began = perf_counter()
        measures = self._measures(trainer) if trainer.world.rank == 0 else {}
        measures = trainer.world.gather_json(measures)[0]  # the other ranks wait for rank 0 here
        iteration.score = measures[trainer.envs.spec.headline]
        iteration.scalars |= {f"eval/{name}": value for name, value in measures.items()}
        iteration.scalars["time/evaluation_seconds"] = perf_counter() - began

    def _measures(self, trainer: "Trainer") -> dict[str, float]:
        """The means over levels; an evaluation whose worker fails is repeated while restarts are left."""
        restarts = trainer.envs.restarts
        while True:
            try:
                return {name: estimate.mean for name, estimate in trainer.evaluate().measures.items()}
            except WorkerError as error:
                if restarts.count >= restarts.maximum:
                    raise
                restarts.count += 1
                trainer.notes.append(f"the evaluation is done again: {str(error).splitlines()[0]}")


FINISH_SECONDS = 10.0
"""An iteration that would take longer to finish may be broken off when the run is to stop; a resumed run repeats it."""


class IterationSnapshot(Callback):
    """Keep the state from before an iteration that is expected to take long, for a run that stops in the middle of it.

    Not where several ranks train, which have to stop after the same iteration.
    """

    def __init__(self) -> None:
        self._seconds = {False: math.inf, True: math.inf}  # of the last iteration without and with an evaluation
        self._started, self._evaluating = -math.inf, False
        self._state: dict[str, Any] | None = None

    def take(self, trainer: "Trainer") -> None:
        """Note that an iteration begins."""
        every = trainer.config.train.eval_every
        self._started, self._evaluating = perf_counter(), bool(every) and (trainer.iteration + 1) % every == 0
        if trainer.writer is not None and trainer.world.size == 1 and self._seconds[self._evaluating] > FINISH_SECONDS:
            self._state = deepcopy(trainer.state_dict())

    def discard(self) -> None:
        """Note that the iteration can no longer be broken off."""
        self._state = None

    def after_iteration(self, iteration: Iteration) -> None:
        self._seconds[self._evaluating] = perf_counter() - self._started
        self.discard()

    def may_drop(self) -> bool:
        """Whether an exception may break off the iteration now, because it is expected to go on for long."""
        left = self._started + self._seconds[self._evaluating] - perf_counter()
        return self._state is not None and left > FINISH_SECONDS

    def save(self, trainer: "Trainer") -> Path | None:
        """Write the state from before the iteration that was broken off; the trainer is of no further use then.

        Returns the checkpoint's path, None where it can't be written.
        """
        assert trainer.run is not None and trainer.writer is not None and self._state is not None
        iteration = self._state["iteration"]
        if trainer.writer.saved == iteration or trainer.writer.save(iteration, self._state):
            return trainer.run.checkpoint(iteration)
        return None


class WriteMetrics(Callback):
    """Write the iteration's row to the metrics and TensorBoard, with histograms now and then."""

    def after_iteration(self, iteration: Iteration) -> None:
        writer, rollout = iteration.trainer.writer, iteration.rollout
        if writer is None:
            return
        writer.report(iteration.report)
        if histograms_due(iteration.number, iteration.trainer.num_iterations):
            tensors = {"state": rollout.state, "value": rollout.value, "advantage": iteration.targets.advantage}
            writer.write_tensorboard(lambda board: board.histograms(tensors, iteration.env_steps))


class SaveCheckpoints(Callback):
    """Write ``best.pt`` when the score rises, and periodic checkpoints by iterations and by the clock.

    Without evaluations the score is the mean headline measure of the last 100 training episodes, looked at when a
    checkpoint is due.
    """

    name = "best"

    def __init__(self) -> None:
        self.best: float | None = None
        self.recent: deque[float] = deque(maxlen=100)

    def after_iteration(self, iteration: Iteration) -> None:
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
            trainer.save()

    def _save_best(self, trainer: "Trainer", score: float) -> None:
        if self.best is not None and score <= self.best:
            return
        before, self.best = self.best, score
        tree = trainer.state_dict()
        if not trainer.on_rank_0(lambda writer: writer.save_best(tree)):
            self.best = before

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.recent.extend(state["recent"])
