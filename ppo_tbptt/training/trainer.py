"""The training loop: collect a rollout, compute targets, update, report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch

from ppo_tbptt.config import Config
from ppo_tbptt.config.resume import describe_changes
from ppo_tbptt.envs import BatchedEnv, LevelSeeds
from ppo_tbptt.evaluation.evaluate import Evaluation
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.ppo.advantages import compute_targets
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.runtime.device import prepare_device
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.rng import TrainingRNG
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training import build, state
from ppo_tbptt.training.callbacks import (
    Callback,
    EvaluateHeldOut,
    Iteration,
    IterationSnapshot,
    SaveCheckpoints,
    WriteMetrics,
    evaluate_held_out,
)
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
        envs: environments to use instead of the config's; the trainer closes them.
        agent: agent to train instead of the config's.
        callbacks: callbacks that run after the built-in ones, in this order.
        restore: tree of a checkpoint to resume from (see :meth:`resume`).
        progress: called with the number of environments whose episodes are replayed, and of all (with ``restore``).
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
        callbacks: Sequence[Callback] = (),
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
        self.snapshot, self.checkpoints = IterationSnapshot(), SaveCheckpoints()
        self.user_callbacks = list(callbacks)
        built_in = [EvaluateHeldOut(), self.snapshot, Instruments(), WriteMetrics(), self.checkpoints]
        self.callbacks = [*built_in, *self.user_callbacks]
        self.rng = TrainingRNG(config.seed, self.world, self.device)
        self.run = None if run_dir is None else RunDir(Path(run_dir))
        self.writer: RunWriter | None = None
        """Rank 0's, where there is a run folder."""
        self._closing = ExitStack()
        try:
            with self.rng.installed():
                self._build(envs, agent)
            self.rng.seed(0)
            with self.rng.installed():
                self.carry = (
                    self.collector.begin() if restore is None else state.load_state_dict(self, restore, progress)
                )
            if self.run is not None and self.world.rank == 0:
                self._open_writer(self.run, resumed=restore is not None)
        except BaseException:
            self.close()
            raise

    def _build(self, envs: BatchedEnv | None, agent: Agent | None) -> None:
        """Build environments, agent, collector and learner."""
        config, world, device = self.config, self.world, self.device
        self.levels: LevelSeeds | None = None
        """Level source of the config's environments; those that were handed in have their own."""
        if envs is None:
            self.levels = build.build_levels(config, world)
            envs = build.build_envs(config, self.levels, self.faults.budget, world, device)
        self.envs = envs
        self._closing.callback(envs.close)
        self.agent = build_agent(config, envs.spec, device) if agent is None else agent.to(device)
        self.collector, self.storage = build.build_collector(config, envs, self.agent, self.notes)
        self._closing.callback(self.collector.close)
        self.learner = build.build_learner(config, self.agent, self.rng.permutation, world)
        if config.compile:
            build.compile_updates(self.learner, config, self.notes)

    def _open_writer(self, run: RunDir, *, resumed: bool) -> None:
        """Create the run folder, or open that of the resumed run."""
        done = self.iteration if resumed else None
        self.writer = RunWriter(run.path, self.config, resumed_from=done, env_steps=self.env_steps)
        self._closing.callback(self.writer.close)
        self.writer.write_run_info(self.envs.spec, self.config, self.device, self.env_steps)

    @classmethod
    def resume(cls, run_dir: str | Path, overrides: dict[str, Any] | None = None, **parts: Any) -> Self:
        """Resume the run in ``run_dir`` from its newest whole checkpoint.

        Environments return into their episodes by episode replay. With the same settings and numbers of ranks and
        threads, the metrics equal those of an uninterrupted run, bit for bit on a CPU; otherwise ``notes`` say why
        not. With another number of ranks, action noise, minibatches and dropout begin new random streams; with another
        number of ranks or environments, all episodes begin anew. Level seeds always go on.

        Args:
            run_dir: the run folder.
            overrides: settings of the run to replace, by dotted key; ``notes`` list the changes.
            parts: ``envs``, ``agent``, ``callbacks``, ``world`` and ``progress`` of the constructor. What was handed
                in before must be handed in again.

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
                iteration = Iteration(self, collected.rollout, targets)
                hooks = {"before_epoch": iteration.before_epoch, "after_epoch": iteration.after_epoch}
                update = self.learner.update(collected.rollout, targets, self.env_steps, timer, **hooks)
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
        return evaluate_held_out(self.agent, self.config, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint. All ranks call it together."""
        return state.state_dict(self)

    def save(self) -> Path | None:
        """Write a checkpoint and delete those beyond ``train.keep_checkpoints``. All ranks call it together.

        Returns:
            The checkpoint's path; None without a run folder, or where writing fails (``notes`` say why).
        """
        return self.checkpoints.save(self)

    def take_notes(self) -> tuple[str, ...]:
        """Return the lines for the user and clear them."""
        notes = (*self.notes, *(self.writer.take_notes() if self.writer else ()))
        self.notes.clear()
        return notes

    def close(self) -> None:
        """End the workers, flush the metrics and release the run folder's lock. May be called again."""
        self._closing.close()
        self.writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
