"""The outer loop: collect, compute targets, update, report."""

import math
from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import astuple, fields
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from ppo_tbptt.config import Config
from ppo_tbptt.config.resume import continued, describe_changes
from ppo_tbptt.envs import (
    EnvSpec,
    Episode,
    FaultBudget,
    LevelSeeds,
    WorkerError,
    resolve_workers,
)
from ppo_tbptt.envs.batched import double_buffered, make_vector_env
from ppo_tbptt.evaluation.evaluate import Evaluation, evaluate
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.models.compile import CompileError, compile_encoder
from ppo_tbptt.ppo.advantages import gae
from ppo_tbptt.ppo.all_reduce import share_weights
from ppo_tbptt.ppo.collector import CollectedRollout, RolloutCollector, rollout_storage
from ppo_tbptt.ppo.learner import Learner, NonFiniteError, UpdateStats
from ppo_tbptt.run.checkpoint import CheckpointError, save_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.run.tensorboard import TensorBoard, histograms_due
from ppo_tbptt.runtime.device import prepare_device, resolve_precision, versions
from ppo_tbptt.runtime.distributed import World
from ppo_tbptt.runtime.rng import Streams
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.report import FaultCounts, episode_scalars, explained_variance, headline, update_scalars
from ppo_tbptt.training.state import check_saved_state, saved_episodes
from ppo_tbptt.types import Carry, Rollout, Targets
from ppo_tbptt.watch.training_video import TrainingVideos

FINISH_SECONDS = 10.0
"""An iteration that would take longer to finish is broken off when the run is to stop, and done again later."""


class Trainer(Iterator[Report]):
    """Trains an agent; iterate over it for one :class:`Report` per iteration.

        with Trainer(Config.load("configs/quickstart.toml")) as trainer:
            for report in trainer:
                print(report.env_steps, report.scalars.get("episode/return"))

    Args:
        config: what to train.
        run_dir: folder for checkpoints, metrics and TensorBoard; None writes nothing.
        restore: a checkpoint's tree to go on from (see :meth:`resume`).
        progress: called with how many environments, of how many, are back in their episodes (with ``restore``).
        world: the ranks that train together. Each has ``env.num_envs`` environments of its own, and steps count over
            all of them; each makes the same calls on its trainer and gets the same reports but for ``time/``; rank 0
            evaluates and writes.

    Raises:
        ConfigError, EnvError, DeviceError: something in the config does not fit the environment or the machine.
        RunDirError: ``run_dir`` exists, can't be written, or another process trains there.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path | None = None,
        *,
        restore: dict[str, Any] | None = None,
        world: World | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        world = world or World()
        self.device = prepare_device(world.device_name(config.device), deterministic=config.deterministic)
        self.world = world.using(self.device)
        precision = str(resolve_precision(config.precision, self.device)).removeprefix("torch.")
        self.config = config = config.replace(precision=precision)  # what was used is what is saved
        torch.manual_seed(config.seed)
        env = config.env
        self.fault_budget = FaultBudget(env.max_worker_restarts)
        first_env = self.world.rank * env.num_envs
        self.levels = LevelSeeds(config.seed, env.num_envs, env.first_seed, env.num_seeds, first_env)
        self.envs = make_vector_env(
            env,
            self.levels,
            num_workers=_own_workers(config, world),
            two_groups=double_buffered(env, cuda=self.device.type == "cuda"),
            replay=env.replay,
            faults=self.fault_budget,
        )
        self._end_envs = self.envs.close
        self.writer: RunWriter | None = None
        """Of rank 0, where there is a run folder."""
        try:
            self._build(run_dir, restore, progress)
        except BaseException:
            self.close()
            raise

    def _build(
        self,
        run_dir: str | Path | None,
        restore: dict[str, Any] | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        config, spec = self.config, self.envs.spec
        self.agent = build_agent(config, spec, self.device)
        self._collector = RolloutCollector(self.envs, self.agent)
        self._end_envs = self._collector.close
        self.streams = Streams(config.seed, self.world, self.device)
        self.learner = Learner(
            self.agent,
            config.ppo,
            total_steps=config.total_steps,
            generator=self.streams.permutation,
            world=self.world,
            max_nonfinite=config.train.max_nonfinite_updates,
        )
        self.iteration = 0
        self.env_steps = 0
        self.restored_ranks: int | None = None
        """How many ranks the checkpoint is of that this run goes on from."""
        self.best: float | None = None
        self.notes: list[str] = []
        """Lines for the user that no report has carried yet."""
        self._faults = FaultCounts()
        self._recent: deque[float] = deque(maxlen=100)  # headline measure of the last training episodes
        self._last_seconds = self._last_evaluation_seconds = math.inf  # how long they took, until known
        self._expected_end = math.inf  # of this iteration, on the clock of perf_counter
        self._before: dict[str, Any] | None = None  # the state before this iteration, while it may be dropped
        self._storage = rollout_storage(config, spec, self.agent.core.state_size, self.device)
        if any(x.device != self._storage.value.device for x in self._storage.obs.values()):
            num_bytes = sum(x.nbytes for x in self._storage.obs.values())
            self.notes.append(f"observations are stored on the host: {num_bytes / 1e9:.1f} GB")
        if restore is not None:
            self._load_state(restore)
        share_weights(self.world, self.agent)
        if config.compile:
            self._compile()
        self.run: RunDir | None = None
        self._videos: TrainingVideos | None = None
        if run_dir is not None:
            self.run = RunDir(Path(run_dir))
            if self.world.rank == 0:
                done = None if restore is None else self.iteration
                self.writer = RunWriter(self.run.path, config, resumed_from=done, env_steps=self.env_steps)
                self.writer.show(self._introduce)
                self._videos = TrainingVideos(self.agent, spec, config, self.run, self.writer)
        if restore is None:
            self._carry = self._collector.begin()
        else:
            self._carry = self._go_on(restore, progress)
            self._load_streams(restore)  # last, because whatever was done by now may have used them

    def _compile(self) -> None:
        num = max(2, self.config.batch_size // self.config.ppo.num_minibatches)
        obs = {
            key: torch.zeros(num, *x.shape[2:], dtype=x.dtype, device=self.device)
            for key, x in self._storage.obs.items()
        }
        try:
            self.learner.encode = compile_encoder(self.agent, obs)
        except CompileError as error:
            self.notes.append(f"not compiled, training goes on without: {error}")

    def _introduce(self, board: TensorBoard) -> None:
        board.layout(self.envs.spec.headline, self.env_steps, held_out=self.config.train.eval_every > 0)
        board.text("config", self.config.to_toml(), self.env_steps)
        board.text("versions", versions(self.device), self.env_steps)

    @classmethod
    def resume(
        cls,
        run_dir: str | Path,
        overrides: dict[str, Any] | None = None,
        *,
        world: World | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Trainer":
        """Go on with the run in ``run_dir`` from its newest whole checkpoint, as if it had never stopped.

        The saved config holds, with ``overrides`` (dotted keys) over it; ``notes`` say what differs. Environments are
        brought back into the middle of their episodes by playing these again. With the same settings, number of ranks
        and of threads, the numbers are those of a run that was never interrupted, bit for bit on a CPU; where that
        can't be, ``notes`` say why. With another number of ranks, or of environments, the generators of action noise,
        minibatches and dropout and all episodes begin anew; level seeds go on.

        Raises:
            RunDirError, CheckpointError, ConfigError: nothing to go on with, or overrides that don't fit it.
        """
        run = RunDir.open(Path(run_dir))
        _, tree = run.load_newest()
        asked = Config.load(run.config, overrides)
        saved = Config.from_dict(tree["config"], source="the config in the checkpoint")
        config = continued(saved, asked)
        trainer = cls(config, run_dir, restore=tree, world=world, progress=progress)
        trainer.notes[:0] = [f"changed: {line}" for line in describe_changes(saved, trainer.config)]
        return trainer

    @property
    def batch_size(self) -> int:
        """Environment steps per iteration, over all ranks."""
        return self.config.batch_size * self.world.size

    @property
    def num_iterations(self) -> int:
        """Of the whole run, those that are done included, whatever their batch size was."""
        left = max(0, self.config.total_steps - self.env_steps)
        return self.iteration + -(-left // self.batch_size)

    # --- one iteration ---------------------------------------------------------------------------------------------

    def __next__(self) -> Report:
        config = self.config
        if self.env_steps >= config.total_steps:
            raise StopIteration
        began = perf_counter()
        self._keep_state(began)
        noise = torch.rand(
            config.ppo.rollout_steps,
            config.env.num_envs,
            len(self.agent.action_nvec),
            generator=self.streams.noise,
        )
        timer = Timer()
        collected = self._collector.collect(self._carry, self._storage, noise, timer)
        targets = self._targets(collected.rollout)
        stats = self._update(collected.rollout, targets, timer)
        self._carry = collected.carry
        seconds = self._last_seconds = perf_counter() - began
        self.iteration += 1
        self.env_steps += self.batch_size

        episodes = self._of_all_ranks(collected.episodes)
        scalars = {
            **episode_scalars(episodes),
            **update_scalars(stats),
            **explained_variance(collected.rollout, targets, self.world),
            **self._fault_scalars(collected, stats),
            "time/steps_per_second": self.batch_size / seconds,
            "time/iteration_seconds": seconds,
            **{f"time/{part}": spent / seconds for part, spent in timer.seconds.items()},
        }
        score, evaluated = self._evaluate_when_due(episodes)
        scalars.update(evaluated)
        self._before = None
        report = Report(iteration=self.iteration, env_steps=self.env_steps, scalars=scalars, notes=self._take_notes())
        if self.writer is not None:
            self.writer.report(report)
            if histograms_due(self.iteration, self.num_iterations):
                tensors = {"state": collected.rollout.state, "value": collected.rollout.value}
                tensors["advantage"] = targets.advantage
                self.writer.show(lambda board: board.histograms(tensors, report.env_steps))
        if score is not None:
            self._save_best(score)
        self._checkpoint_when_due()
        if self._videos is not None:
            self._videos.when_due(self.iteration, self.env_steps)
        return report

    def _update(self, rollout: Rollout, targets: Targets, timer: Timer) -> UpdateStats:
        try:
            return self.learner.update(rollout, targets, self.env_steps, timer)
        except NonFiniteError as error:
            self._before = None
            if self.run is None or error.minibatch is None:
                raise
            path = self.run.path / f"nonfinite_rank{self.world.rank}.pt"
            batch = {f.name: getattr(error.minibatch, f.name) for f in fields(error.minibatch)}
            save_checkpoint(path, {"iteration": self.iteration + 1, "minibatch": batch})
            raise NonFiniteError(f"{error}; the last minibatch is in {path}", error.minibatch) from error

    def _fault_scalars(self, collected: CollectedRollout, stats: UpdateStats) -> dict[str, float]:
        self.notes += collected.faults
        if stats.num_nonfinite:
            text = f"iteration {self.iteration}: {stats.num_nonfinite} of {stats.num_updates} updates skipped"
            self.notes.append(f"{text}: loss or gradient was NaN or infinite")
        self._faults.cut_episodes += collected.cut_episodes
        self._faults.nonfinite_updates += stats.num_nonfinite
        return self._faults.scalars(self.world, self.fault_budget)

    def _take_notes(self) -> tuple[str, ...]:
        if self.writer is not None:
            self.notes += self.writer.patience.notes
            self.writer.patience.notes.clear()
        taken = tuple(self.notes)
        self.notes.clear()
        return taken

    def _targets(self, rollout: Rollout) -> Targets:
        ppo = self.config.ppo
        advantage = gae(
            rollout.reward,
            rollout.value,
            rollout.next_value,
            rollout.terminated | rollout.truncated,
            gamma=ppo.gamma,
            gae_lambda=ppo.gae_lambda,
        )
        return Targets(advantage=advantage, ret=advantage + rollout.value)

    def _of_all_ranks(self, episodes: list[Episode]) -> list[Episode]:
        if self.world.size == 1:
            return episodes
        rows = self.world.gather_json([astuple(episode) for episode in episodes])
        return [Episode(*fields) for row in rows for fields in row]

    # --- held-out evaluation and the best checkpoint ----------------------------------------------------------------

    def evaluate(self, **kwargs: Any) -> Evaluation:
        """Play the config's held-out level seeds with the current agent; ``kwargs`` as of ``evaluate``."""
        train = self.config.train
        first = train.eval_first_seed
        defaults: dict[str, Any] = {
            "seeds": range(first, first + train.eval_num_seeds),
            "repeats": train.eval_repeats,
            "greedy": train.eval_greedy,
            "max_steps": train.eval_max_steps,
            "num_workers": self.config.env.num_workers,
        }
        return evaluate(self.agent, self.config.env, **{**defaults, **kwargs})

    def _evaluate_when_due(self, episodes: list[Episode]) -> tuple[float | None, dict[str, float]]:
        """The headline measure, where there was an evaluation, and all scalars of it."""
        measure = self.envs.spec.headline
        self._recent.extend(headline(episode, measure) for episode in episodes)
        if not self._evaluates_after(self.iteration):
            return None, {}
        began = perf_counter()
        measures = self._measures() if self.world.rank == 0 else {}
        measures = self.world.gather_json(measures)[0]  # where the other ranks wait for rank 0
        scalars = {f"eval/{name}": value for name, value in measures.items()}
        self._last_evaluation_seconds = perf_counter() - began
        return measures[measure], {**scalars, "time/evaluation_seconds": self._last_evaluation_seconds}

    def _evaluates_after(self, iteration: int) -> bool:
        every = self.config.train.eval_every
        return bool(every) and iteration % every == 0

    def _measures(self) -> dict[str, float]:
        """Of an evaluation, which is done again where a worker fails, as long as restarts are left."""
        while True:
            try:
                return {name: e.mean for name, e in self.evaluate().measures.items()}
            except WorkerError as error:
                self.notes.append(self.fault_budget.spend(error, "the evaluation is done again"))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _save_best(self, score: float) -> None:
        if self.run is None or (self.best is not None and score <= self.best):
            return
        before, self.best = self.best, score
        tree = self.state_dict()
        if not self._on_rank_0(lambda writer: writer.best(tree)):
            self.best = before

    def _on_rank_0(self, write: Callable[[RunWriter], bool]) -> bool:
        """What ``write`` returned on the rank that writes."""
        return self.world.gather_json(self.writer is None or write(self.writer))[0]

    def _checkpoint_when_due(self) -> None:
        if self.run is None:
            return
        train = self.config.train
        last = self.env_steps >= self.config.total_steps
        due = self.iteration % train.checkpoint_every == 0 or last
        if due and not train.eval_every and len(self._recent) == self._recent.maxlen:
            self._save_best(float(np.mean(self._recent)))
        if last:
            tree = self.state_dict()
            if self.writer is not None:
                self.writer.last(self.iteration, tree)
        elif due or self.world.largest(int(self.writer is not None and self.writer.due())):
            self.save()

    def save(self) -> Path | None:
        """Write a checkpoint now and delete those that retention no longer keeps.

        Returns its path; None without a run folder or where it can't be written (the notes say so then). All ranks
        call it together.
        """
        if self.run is None:
            return None
        if not self._on_rank_0(lambda writer: writer.saved == self.iteration):
            tree = self.state_dict()
            if not self._on_rank_0(lambda writer: writer.checkpoint(self.iteration, tree)):
                return None
        return self.run.checkpoint(self.iteration)

    def _keep_state(self, began: float) -> None:
        """Before an iteration that may take long: what a checkpoint needs if it is broken off."""
        seconds = self._last_seconds
        if self._evaluates_after(self.iteration + 1):
            seconds += self._last_evaluation_seconds
        self._expected_end = began + seconds
        if self.writer is not None and self.world.size == 1 and seconds > FINISH_SECONDS:
            self._before = deepcopy(self.state_dict())

    def may_drop(self) -> bool:
        """Whether an exception may now break off the iteration, because it is expected to go on for long.

        What has been saved with :meth:`save_dropped` goes on before that iteration. Not where several ranks train.
        """
        return self._before is not None and self._expected_end - perf_counter() > FINISH_SECONDS

    def save_dropped(self) -> Path | None:
        """Like :meth:`save`, after an exception in the middle of an iteration: that one is lost, and done again later.

        The trainer is of no further use then.
        """
        assert self.run is not None and self.writer is not None and self._before is not None
        iteration = self._before["iteration"]
        if self.writer.saved == iteration or self.writer.checkpoint(iteration, self._before):
            return self.run.checkpoint(iteration)
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain tensors, numbers and strings. All ranks call it together."""
        counts = self.world.gather(torch.tensor(self.levels.state_dict()["counts"]))
        first, *others = self.streams.state()
        return {
            "version": version("ppo-tbptt"),
            "config": self.config.to_dict(),
            "spec": self.envs.spec.to_json(),
            "iteration": self.iteration,
            "env_steps": self.env_steps,
            "best": self.best,
            "recent": list(self._recent),
            "agent": self.agent.state_dict(),
            "optimizer": self.learner.optimizer.state_dict(),
            "level_seeds": torch.cat(counts).tolist(),
            "generators": first,
            "generators_of_other_ranks": others,
            "environments": saved_episodes(self.world, self.envs, self._carry),
            "faults": self.world.gather_json(self._faults.state(self.fault_budget)),
        }

    def _load_state(self, tree: dict[str, Any]) -> None:
        """Raises:
        CheckpointError: what is in the checkpoint can't be, or is of another agent or environment.
        """
        try:
            check_saved_state(tree, state_size=self.agent.core.state_size)
            saved, spec = EnvSpec.from_json(tree["spec"]), self.envs.spec
            for name in ("obs", "action_nvec", "discrete"):
                old, new = getattr(saved, name), getattr(spec, name)
                if old != new:
                    text = f"{spec.env_id}: its {name} is {new} now and was {old} when the run was saved"
                    raise ValueError(f"{text}; the agent can't play it")
            self.agent.load_state_dict(tree["agent"])
            self.iteration, self.env_steps = tree["iteration"], tree["env_steps"]
            if self.iteration:
                self.learner.load_optimizer(tree["optimizer"])
            self.best = tree["best"]
            self._recent.extend(tree["recent"])
            counts, missing = tree["level_seeds"], [0] * (self.config.env.num_envs * self.world.size)
            own = slice(self.config.env.num_envs * self.world.rank, self.config.env.num_envs * (self.world.rank + 1))
            self.levels.load_state_dict({"counts": [*counts, *missing[len(counts) :]][own]})
            self.restored_ranks = len(tree["environments"])
            same_ranks = self.restored_ranks == self.world.size
            self._faults = FaultCounts(*tree["faults"][self.world.rank if same_ranks else 0])
            if same_ranks:
                self.streams.load_state([tree["generators"], *tree["generators_of_other_ranks"]])
        except Exception as error:  # torch and the rest raise many kinds at what they can't use
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            raise CheckpointError(f"the checkpoint can't be gone on with: {reason}") from error

    def _load_streams(self, tree: dict[str, Any]) -> None:
        """With as many ranks all of them go on; with more or fewer they begin anew, and only the level seeds go on."""
        if self.restored_ranks == self.world.size:
            self.streams.load_state([tree["generators"], *tree["generators_of_other_ranks"]])
            return
        self.streams.begin(self.env_steps)
        text = f"the checkpoint is of {self.restored_ranks} rank(s), this run of {self.world.size}"
        self.notes.append(f"{text}: action noise, minibatches and dropout begin new random streams")

    def _go_on(self, tree: dict[str, Any], progress: Callable[[int, int], None] | None) -> Carry:
        """Back into the episodes of the checkpoint, or, where that can't be, into new ones; a note says so then."""
        saved, own = tree["config"]["env"], self.config.to_dict()["env"]
        ranks, num_envs = tree["environments"], self.config.env.num_envs
        changed = [key for key in ("options", "max_episode_steps", "num_envs") if saved.get(key) != own.get(key)]
        reason = f"env.{changed[0]} is another" if changed else ""
        if len(ranks) != self.world.size:
            reason = "the number of ranks is another"
        elif not self.config.env.replay or "steps" not in ranks[0]:
            reason = "env.replay is, or was, false"
        if reason:
            self.notes.append(f"not exact: all environments begin new episodes, because {reason}")
            return self._collector.begin()
        rank = ranks[self.world.rank]
        carry, exact = self._collector.resume(rank, rank["start"], rank["state"], progress)
        if not exact.all():
            which = ", ".join(map(str, np.flatnonzero(~exact)[:10].tolist()))
            self.notes.append(
                f"not exact: {int((~exact).sum())} of {num_envs} environments (number {which}) did not repeat their "
                "episodes when played again, and begin new ones"
            )
        return carry

    def close(self) -> None:
        """Stop the workers, flush the metrics and give the run's folder free. May be called again."""
        self._end_envs()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _own_workers(config: Config, world: World) -> int | Literal["auto"]:
    """The ranks of a machine divide its cores between them."""
    env, ranks = config.env, world.local_size
    if env.num_workers != "auto" or ranks == 1:
        return env.num_workers
    return max(1, resolve_workers("auto", env.num_envs * ranks) // ranks)
