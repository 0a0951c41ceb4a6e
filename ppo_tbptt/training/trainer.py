"""The training loop: collect a rollout, compute targets, update, report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.config.resume import describe_changes
from ppo_tbptt.envs import BatchedEnv
from ppo_tbptt.evaluation.evaluate import Evaluation
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.advantages import compute_targets
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.runtime.device import prepare_device
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.rng import TrainingRNG
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training import build, state
from ppo_tbptt.training import callbacks as hooks
from ppo_tbptt.training.instruments import Instruments
from ppo_tbptt.training.report import FaultCounts, gather_episodes, iteration_scalars


class Trainer(Iterator[Report]):
    """Trains an agent; iterate over it for one :class:`Report` per iteration.

        with Trainer(Config.load("configs/quickstart.toml")) as trainer:
            for report in trainer:
                print(report.env_steps, report.scalars.get("episode/return"))

    Args:
        config: the settings of the run.
        run_dir: folder for checkpoints, metrics and TensorBoard; None writes nothing.
        envs, agent: what to use instead of the config's; the trainer closes the environments.
        callbacks: callbacks that run after the built-in ones, in this order.
        restore: tree of a checkpoint to go on from (see :meth:`resume`), and then
        progress: is called with the number of environments whose episodes are replayed, and of all.
        world: ranks that train together. Each has ``env.num_envs`` environments; steps are counted over all ranks. All
            make the same calls and get the same reports, except for ``time/*``; rank 0 evaluates and writes.

    Raises:
        ConfigError, EnvError, DeviceError: the config does not fit the environment or the machine.
        CheckpointError: ``restore`` does not fit the agent or the environment.
        RunDirError: ``run_dir`` exists, can't be written, or is in use by another process.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path | None = None,
        *,
        envs: BatchedEnv | None = None,
        agent: Agent | None = None,
        callbacks: Sequence[hooks.Callback] = (),
        restore: dict[str, Any] | None = None,
        world: World | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        world = world or World()
        self.device = prepare_device(world.device_name(config.device), deterministic=config.deterministic)
        self.world = world.with_device(self.device)
        self.config = build.with_resolved_precision(config, self.device)
        self.handed_in = [name for name, part in {"envs": envs, "agent": agent}.items() if part is not None]
        self.iteration = self.env_steps = 0
        self.notes: list[str] = []
        """Lines for the user that no report contains yet."""
        self.faults = FaultCounts(self.world, config.env.max_worker_restarts)
        self.snapshot, self.checkpoints = hooks.IterationSnapshot(), hooks.SaveCheckpoints()
        self.user_callbacks = list(callbacks)
        built_in = [hooks.AdvanceCurriculum(), hooks.EvaluateHeldOut(), self.snapshot, Instruments()]
        built_in += [hooks.WriteMetrics(), self.checkpoints]
        self.callbacks = [*built_in, *self.user_callbacks]
        self.rng = TrainingRNG(config.seed, self.world, self.device)
        self.run = None if run_dir is None else RunDir(Path(run_dir))
        self.writer: RunWriter | None = None
        """Rank 0's, where there is a run folder."""
        self._closing = ExitStack()
        try:
            with self.rng.installed():
                parts = build.build_parts(self, envs, agent, self._closing)
            self.envs, self.levels, self.agent = parts.envs, parts.levels, parts.agent
            self.collector, self.storage, self.learner = parts.collector, parts.storage, parts.learner
            self.rng.seed(0)
            with self.rng.installed():
                if restore is None:
                    self.carry = self.collector.begin()
                    build.fit_normalization(self)
                else:
                    self.carry = state.load_state_dict(self, restore, progress)
            if self.run is not None and self.world.rank == 0:
                done = None if restore is None else self.iteration
                self.writer = RunWriter(self.run.path, self.config, resumed_from=done, env_steps=self.env_steps)
                self._closing.callback(self.writer.close)
                self.writer.write_run_info(self.envs.spec, self.config, self.device, self.env_steps)
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(cls, run_dir: str | Path, overrides: dict[str, Any] | None = None, **parts: Any) -> Self:
        """Resume a run from its newest whole checkpoint; ``notes`` say what changed, and what is not exact and why.

        With the same settings and numbers of ranks and threads, the metrics equal those of an uninterrupted run, bit
        for bit on a CPU.

        Args:
            run_dir: the run folder.
            overrides: settings of the run to replace, by dotted key.
            parts: arguments of the constructor. What was handed in before must be handed in again.

        Raises:
            RunDirError, CheckpointError, ConfigError: the run can't be resumed, or an override can't change in a run.
        """
        saved, config, tree = state.load_run(Path(run_dir), overrides, parts)
        trainer = cls(config, run_dir, **parts, restore=tree)
        trainer.notes[:0] = [f"changed: {line}" for line in describe_changes(saved, trainer.config)]
        return trainer

    @property
    def batch_size(self) -> int:
        """Environment steps per iteration, over all ranks."""
        return self.config.batch_size * self.world.size

    @property
    def num_iterations(self) -> int:
        """Iterations of the whole run, including those already done."""
        left = max(0, self.config.total_steps - self.env_steps)
        return self.iteration + -(-left // self.batch_size)

    def __next__(self) -> Report:
        if self.env_steps >= self.config.total_steps:
            raise StopIteration
        ppo, timer = self.config.ppo, Timer()
        with self.rng.installed(), state.saving_nonfinite_minibatch(self):
            self.snapshot.take(self)
            with timer.whole():
                uniforms = torch.rand(self.storage.action.shape, generator=self.rng.noise)
                collected = self.collector.collect(self.carry, self.storage, uniforms, timer)
                targets = compute_targets(collected.rollout, gamma=ppo.gamma, gae_lambda=ppo.gae_lambda)
                iteration = hooks.Iteration(self, collected.rollout, targets)
                around = {"before_epoch": iteration.before_epoch, "after_epoch": iteration.after_epoch}
                update = self.learner.update(collected.rollout, targets, self.env_steps, timer, **around)
                self.carry = collected.carry
            self.iteration, self.env_steps = iteration.number, iteration.env_steps
            self.faults.count(collected, update, iteration.number, self.notes)
            iteration.episodes = gather_episodes(self.world, collected.episodes)
            iteration.scalars |= iteration_scalars(iteration, collected, update, timer)
            for callback in self.callbacks:
                callback.after_iteration(iteration)
        return iteration.report

    def evaluate(self, **kwargs: Any) -> Evaluation:
        """Evaluate the agent on the config's held-out level seeds; ``kwargs`` override arguments of `evaluate`."""
        return hooks.evaluate_held_out(self.agent, self.config, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint. All ranks call it together."""
        return state.state_dict(self)

    def save(self) -> Path | None:
        """Write a checkpoint; see `SaveCheckpoints.save`. All ranks call it together.

        Raises:
            RuntimeError: the trainer is closed.
        """
        if self.run is not None and self.world.rank == 0 and self.writer is None:
            raise RuntimeError(f"{self.run.path}: the trainer is closed; save() must come before close()")
        return self.checkpoints.save(self)

    def close(self) -> None:
        """End the workers, flush the metrics and release the run folder's lock. May be called again."""
        self._closing.close()
        self.writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
