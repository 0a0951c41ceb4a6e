"""The outer loop: collect, compute targets, update, report."""

from collections import deque
from collections.abc import Iterator
from dataclasses import astuple
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.advantages import gae
from ppo_tbptt.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ppo_tbptt.config import Config
from ppo_tbptt.device import prepare_device, resolve_precision, versions
from ppo_tbptt.distributed import World
from ppo_tbptt.envs import Episode, LevelSeeds, VectorEnv, resolve_workers
from ppo_tbptt.evaluation import Evaluation, evaluate
from ppo_tbptt.files import write_text
from ppo_tbptt.learner import Learner, UpdateStats
from ppo_tbptt.metrics import MetricsWriter, Report
from ppo_tbptt.models.build import build_agent
from ppo_tbptt.rollout import begin, collect
from ppo_tbptt.run_dir import RunDir
from ppo_tbptt.sharing import share_weights
from ppo_tbptt.streams import Streams
from ppo_tbptt.tensorboard import TensorBoard, histograms_due
from ppo_tbptt.timing import Timer
from ppo_tbptt.types import Rollout, Targets, empty_rollout


class Trainer(Iterator[Report]):
    """Trains an agent; iterate over it for one :class:`Report` per iteration.

        with Trainer(Config.load("configs/quickstart.toml")) as trainer:
            for report in trainer:
                print(report.env_steps, report.scalars.get("episode/return"))

    Args:
        config: what to train.
        run_dir: folder for checkpoints, metrics and TensorBoard; None writes nothing.
        restore: a checkpoint's tree to go on from (see :meth:`resume`).
        world: the ranks that train together. Each has ``env.num_envs`` environments of its own, and steps count over
            all of them; each makes the same calls on its trainer and gets the same reports but for ``time/``; rank 0
            evaluates and writes.

    Raises:
        ConfigError, EnvError, DeviceError: something in the config does not fit the environment or the machine.
        RunDirError: ``run_dir`` exists.
    """

    def __init__(
        self,
        config: Config,
        run_dir: str | Path | None = None,
        *,
        restore: dict[str, Any] | None = None,
        world: World | None = None,
    ) -> None:
        world = world or World()
        self.device = prepare_device(world.device_name(config.device))
        self.world = world.using(self.device)
        precision = str(resolve_precision(config.precision, self.device)).removeprefix("torch.")
        self.config = config = config.replace(precision=precision)  # what was used is what is saved
        torch.manual_seed(config.seed)
        env = config.env
        self.envs = VectorEnv(
            env.id,
            num_envs=env.num_envs,
            num_workers=_own_workers(config, world),
            options=env.options,
            max_episode_steps=env.max_episode_steps,
        )
        try:
            self._build(run_dir, restore)
        except BaseException:
            self.envs.close()
            raise

    def _build(self, run_dir: str | Path | None, restore: dict[str, Any] | None) -> None:
        config, spec = self.config, self.envs.spec
        self.agent = build_agent(config, spec, self.device)
        self.streams = Streams(config.seed, self.world)
        self.learner = Learner(
            self.agent,
            config.ppo,
            total_steps=config.total_steps,
            generator=self.streams.permutation,
            world=self.world,
        )
        env = config.env
        first_env = self.world.rank * env.num_envs
        self.seeds = LevelSeeds(config.seed, env.num_envs, env.first_seed, env.num_seeds, first_env)
        self.iteration = 0
        self.env_steps = 0
        self.restored_ranks: int | None = None
        """How many ranks the checkpoint is of that this run goes on from."""
        self._saved: int | None = None  # iteration of the newest checkpoint
        self.best: float | None = None
        self._recent: deque[float] = deque(maxlen=100)  # headline measure of the last training episodes
        self._storage = self._empty_storage()
        if restore is not None:
            self._load_state(restore)
        share_weights(self.world, self.agent)
        self.run: RunDir | None = None
        self._writer: MetricsWriter | None = None
        self.board: TensorBoard | None = None
        """Of rank 0, where there is a run folder."""
        if run_dir is not None:
            self._open_run(Path(run_dir), resumed=restore is not None)
        self._carry = begin(self.envs, self.seeds, self.agent)

    def _empty_storage(self) -> Rollout:
        spec = self.envs.spec
        return empty_rollout(
            {key: (array.shape, getattr(torch, array.dtype)) for key, array in spec.obs.items()},
            num_steps=self.config.ppo.rollout_steps,
            num_envs=self.config.env.num_envs,
            num_branches=len(spec.action_nvec),
            state_size=self.agent.core.state_size,
            device=self.device,
        )

    def _open_run(self, path: Path, *, resumed: bool) -> None:
        if self.world.rank > 0:
            self.run = RunDir(path)  # to know that there is one: only rank 0 writes
            return
        self.run = RunDir.open(path) if resumed else RunDir.create(path)
        write_text(self.run.config, self.config.to_toml())
        self._writer = MetricsWriter(path, resume_from=self.iteration if resumed else None)
        self.board = TensorBoard(path, after=self.env_steps if resumed else None)
        self.board.layout(self.envs.spec.headline, self.env_steps, held_out=self.config.train.eval_every > 0)
        self.board.text("config", self.config.to_toml(), self.env_steps)
        self.board.text("versions", versions(self.device), self.env_steps)

    @classmethod
    def resume(
        cls, run_dir: str | Path, overrides: dict[str, Any] | None = None, *, world: World | None = None
    ) -> "Trainer":
        """Go on with the run in ``run_dir`` from its newest checkpoint.

        The saved config holds, with ``overrides`` (dotted keys) over it. Model, optimiser, schedules, counters and
        generators go on; the environments begin new episodes. With another number of ranks in ``world`` than the
        checkpoint has, the generators of action noise, minibatches and dropout begin anew; level seeds go on.

        Raises:
            RunDirError, CheckpointError, ConfigError: nothing to go on with, or overrides that don't fit it.
        """
        run = RunDir.open(Path(run_dir))
        config = Config.load(run.config, overrides)
        return cls(config, run_dir, restore=load_checkpoint(run.newest()), world=world)

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
        noise = torch.rand(
            config.ppo.rollout_steps,
            config.env.num_envs,
            len(self.agent.action_nvec),
            generator=self.streams.noise,
        )
        timer = Timer()
        collected = collect(self.envs, self.seeds, self.agent, self._carry, self._storage, noise, timer)
        self._carry = collected.carry
        targets = self._targets(collected.rollout)
        stats = self.learner.update(collected.rollout, targets, self.env_steps, timer)
        seconds = perf_counter() - began
        self.iteration += 1
        self.env_steps += self.batch_size

        episodes = self._of_all_ranks(collected.episodes)
        scalars = {
            **_episode_scalars(episodes),
            **_update_scalars(stats),
            **_explained_variance(collected.rollout, targets, self.world),
            "time/steps_per_second": self.batch_size / seconds,
            "time/iteration_seconds": seconds,
            **{f"time/{part}": spent / seconds for part, spent in timer.seconds.items()},
        }
        scalars.update(self._evaluate_when_due(episodes))
        report = Report(iteration=self.iteration, env_steps=self.env_steps, scalars=scalars)
        self._record(report, collected.rollout, targets)
        self._checkpoint_when_due()
        return report

    def _record(self, report: Report, rollout: Rollout, targets: Targets) -> None:
        if self._writer is None or self.board is None:
            return
        self._writer.write(report)
        self.board.write(report)
        if histograms_due(self.iteration, self.num_iterations):
            tensors = {"state": rollout.state, "value": rollout.value, "advantage": targets.advantage}
            self.board.histograms(tensors, report.env_steps)

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

    def _evaluate_when_due(self, episodes: list[Episode]) -> dict[str, float]:
        headline = self.envs.spec.headline
        self._recent.extend(_headline(episode, headline) for episode in episodes)
        every = self.config.train.eval_every
        if not every or self.iteration % every:
            return {}
        began = perf_counter()
        measures = {name: e.mean for name, e in self.evaluate().measures.items()} if self.world.rank == 0 else {}
        measures = self.world.gather_json(measures)[0]  # where the other ranks wait for rank 0
        self._save_best(measures[headline])
        scalars = {f"eval/{name}": value for name, value in measures.items()}
        return {**scalars, "time/evaluation_seconds": perf_counter() - began}

    def _save_best(self, score: float) -> None:
        if self.run is not None and (self.best is None or score > self.best):
            self.best = score
            self._write(self.run.best)

    def _write(self, path: Path) -> None:
        state = self.state_dict()
        if self.world.rank == 0:
            save_checkpoint(path, state)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoint_when_due(self) -> None:
        if self.run is None:
            return
        train = self.config.train
        if self.iteration % train.checkpoint_every == 0 or self.env_steps >= self.config.total_steps:
            if not train.eval_every and len(self._recent) == self._recent.maxlen:
                self._save_best(float(np.mean(self._recent)))
            self.save()

    def save(self) -> Path | None:
        """Write a checkpoint now and delete those that retention no longer keeps; None without a run folder.

        All ranks call it together.
        """
        if self.run is None:
            return None
        path = self.run.checkpoint(self.iteration)
        if self._saved != self.iteration:
            self._write(path)
            self._saved = self.iteration
            if self.world.rank == 0:
                self.run.prune(self.config.train.keep_checkpoints)
        return path

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as plain tensors, numbers and strings. All ranks call it together."""
        counts = self.world.gather(torch.tensor(self.seeds.state()))
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
        }

    def _load_state(self, tree: dict[str, Any]) -> None:
        try:
            self.agent.load_state_dict(tree["agent"])
            self.learner.optimizer.load_state_dict(tree["optimizer"])
            self.iteration, self.env_steps = tree["iteration"], tree["env_steps"]
            self._saved = self.iteration
            self.best = tree["best"]
            self._recent.extend(tree["recent"])
            self._load_streams(tree["level_seeds"], [tree["generators"], *tree.get("generators_of_other_ranks", [])])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(f"the checkpoint does not fit this config: {reason}") from error

    def _load_streams(self, counts: list[int], ranks: list[dict[str, Tensor]]) -> None:
        """With as many ranks all streams go on; with more or fewer only the level seeds, by number of environment."""
        num_envs, rank, size = self.config.env.num_envs, self.world.rank, self.world.size
        self.restored_ranks = len(ranks)
        if len(ranks) == size:
            self.streams.load_state(ranks)
        else:
            self.streams.begin(self.env_steps)
            counts = (counts + [0] * num_envs * size)[: num_envs * size]
        if len(counts) != num_envs * size:
            raise ValueError(f"level seeds of {len(counts)} environments, not {num_envs * size}")
        self.seeds.load_state(counts[num_envs * rank :][:num_envs])

    def close(self) -> None:
        """Stop the workers and flush the metrics. May be called again."""
        self.envs.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.board is not None:
            self.board.close()

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


def _headline(episode: Episode, name: str) -> float:
    return episode.ret if name == "return" else episode.measures[name]


def _episode_scalars(episodes: list[Episode]) -> dict[str, float]:
    """Means over the episodes that ended in this iteration; nothing where none did."""
    columns: dict[str, list[float]] = {}
    for episode in episodes:
        columns.setdefault("episode/return", []).append(episode.ret)
        columns.setdefault("episode/length", []).append(float(episode.length))
        for name, value in episode.measures.items():
            columns.setdefault(f"episode/{name}", []).append(value)
        for name, value in episode.env.items():
            columns.setdefault(f"env/{name}", []).append(value)
    count = {"episode/count": float(len(episodes))}
    return count | {tag: float(np.mean(values)) for tag, values in columns.items()}


def _update_scalars(stats: UpdateStats) -> dict[str, float]:
    loss = stats.loss
    return {
        "loss/total": loss["loss"],
        "loss/policy": loss["policy_loss"],
        "loss/value": loss["value_loss"],
        "policy/entropy": loss["entropy"],
        "policy/approx_kl": loss["approx_kl"],
        "policy/clip_fraction": loss["clip_fraction"],
        "optim/grad_norm": loss["grad_norm"],
        "optim/learning_rate": stats.learning_rate,
        "optim/entropy_coef": stats.entropy_coef,
        "optim/clip_range": stats.clip_range,
        "optim/updates": float(stats.num_updates),
        "sequences/count": float(stats.num_sequences),
        "sequences/mean_length": stats.mean_length,
        "sequences/padding_fraction": stats.padding_fraction,
    }


def _explained_variance(rollout: Rollout, targets: Targets, world: World) -> dict[str, float]:
    """1 - Var(return - value) / Var(return); nothing where all returns are equal."""
    variance = world.variance(targets.ret)
    if variance == 0:
        return {}
    return {"policy/explained_variance": 1 - world.variance(targets.ret - rollout.value) / variance}
