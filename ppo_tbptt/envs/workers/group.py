"""Several environments stepped one after the other, in a worker process or in the process of the batch itself."""

import time
import traceback
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ppo_tbptt.envs.interface import EnvError, WorkerError
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.workers.ipc import Blocks
from ppo_tbptt.envs.workers.replay import EpisodeRecorder, EpisodeReplay

_HEARTBEAT_S = 0.2
"""How often a group that replays episodes sends a sign of life."""

Fault = tuple[int, str]
"""Index of an environment that broke, and a text for the user."""


@dataclass(slots=True)
class _Slot:
    index: int
    env: SingleEnv
    recorder: EpisodeRecorder
    stage: int = 0
    idle: bool = True
    broken: bool = False


class EnvGroup:
    """Environments `indices` of a batch: reads actions and seeds from its Blocks, writes everything else to them.

    An environment is idle, its observation zero, until it begins an episode, and after one with seed -1. One that
    fails is left alone until it is to begin an episode again, and is made anew then.

    spec: what all of them look like.
    """

    def __init__(
        self, arguments: dict[str, Any], indices: range, replay: bool, stages: Sequence[Mapping[str, Any]]
    ) -> None:
        """Make the environments with the `arguments` of `make_env`.

        `replay`: record their unfinished episodes. `stages`: the options of each stage from 1 on, over those of
        `arguments`.
        """
        self._arguments, self._replay, self._stages = arguments, replay, [{}, *stages]
        envs = [make_env(**arguments) for _ in indices]
        for number, options in enumerate(stages):
            try:
                envs[0].check_options(options)
            except EnvError as error:
                raise EnvError(f"env.curriculum.stages[{number}]: {error}") from None
        self.spec = envs[0].spec
        self._slots = [_Slot(index, env, EpisodeRecorder(self.spec)) for index, env in zip(indices, envs, strict=True)]

    def attach(self, blocks: Blocks) -> None:
        """Work on `blocks` from now on."""
        self._blocks = blocks

    def answers(self, command: str, *arguments: Any) -> Iterator[Any]:
        """Run a command of the batch, and yield its answers.

        step, begin [[index, level seed, stage]]: one, (episodes that ended, faults), or None without either.
        replays: one, an EpisodeReplay for each environment.
        restore [EpisodeReplay]: (index, exact) for each environment when it is done, and None now and then.
        """
        match command:
            case "step":
                yield self._step()
            case "begin":
                faults: list[Fault] = []
                for index, seed, stage in arguments[0]:
                    self._begin(self._slots[index - self._slots[0].index], seed, stage, faults)
                yield ([], faults) if faults else None
            case "replays":
                yield [slot.recorder.replay for slot in self._slots]
            case "restore":
                for slot, replay in zip(self._slots, arguments[0], strict=True):
                    exact = yield from self._restore(slot, EpisodeReplay(*replay))
                    yield slot.index, exact

    def close(self) -> None:
        """Close the environments."""
        for slot in self._slots:
            slot.env.close()

    def _step(self) -> tuple[list[Any], list[Fault]] | None:
        """Step every environment that is not idle; where one finishes, begin its next level."""
        blocks, replay = self._blocks, self._replay
        rewards, terminated, truncated = blocks.reward, blocks.terminated, blocks.truncated
        episodes: list[Any] = []
        faults: list[Fault] = []
        for slot in self._slots:
            index = slot.index
            if slot.idle:
                rewards[index], terminated[index], truncated[index] = 0.0, False, False
                continue
            action = blocks.action[index]
            try:
                obs, reward, terminated[index], truncated[index], episode = slot.env.step(action)
            except (Exception, SystemExit) as error:
                faults.append(_fault(slot, "step", error))
                continue
            rewards[index] = reward
            if episode is None:
                blocks.show(index, obs)
                if replay:
                    slot.recorder.add(action, obs, reward)
            else:
                for key, value in obs.items():
                    blocks.final_obs[key][index] = value
                episodes.append(replace(episode, index=index, stage=slot.stage).values())
                self._begin(slot, int(blocks.next_seeds[index]), int(blocks.next_stages[index]), faults)
        return (episodes, faults) if episodes or faults else None

    def _begin(self, slot: _Slot, seed: int, stage: int, faults: list[Fault]) -> None:
        slot.idle, slot.stage = seed < 0, stage
        if slot.idle:
            slot.recorder.begin(-1, {})
            self._blocks.show(slot.index, None)
            return
        try:
            if slot.broken:
                self._make_anew(slot)
            obs = slot.env.reset(seed, self._stages[stage])
        except (Exception, SystemExit) as error:
            faults.append(_fault(slot, f"reset to level seed {seed}", error))
            return
        if self._replay:
            slot.recorder.begin(seed, obs, stage)
        self._blocks.show(slot.index, obs)

    def _make_anew(self, slot: _Slot) -> None:
        with suppress(Exception):  # it has failed already
            slot.env.close()
        env = make_env(**self._arguments)
        if env.spec != self.spec:
            raise WorkerError(f"it was made anew, and looks different: {env.spec}, not {self.spec}")
        slot.env, slot.broken = env, False

    def _restore(self, slot: _Slot, replay: EpisodeReplay) -> Generator[None, None, bool]:
        """Replay an episode, and return whether the environment is where it was."""
        if replay.seed < 0:
            self._begin(slot, -1, 0, [])
            return True
        alive, slot.stage = time.monotonic(), replay.stage
        try:
            obs = slot.env.reset(replay.seed, self._stages[replay.stage])
            slot.recorder.begin(replay.seed, obs, replay.stage)
            for action in replay.actions.astype("int64"):
                obs, reward, _, _, episode = slot.env.step(action)
                if episode is not None:
                    return False
                slot.recorder.add(action, obs, reward)
                if time.monotonic() - alive > _HEARTBEAT_S:
                    yield
                    alive = time.monotonic()
        except (Exception, SystemExit):
            slot.broken = True
            return False  # a new episode will tell whether the environment works
        slot.idle = False
        self._blocks.show(slot.index, obs)
        return slot.recorder.replay.digest == replay.digest


def _fault(slot: _Slot, doing: str, error: BaseException) -> Fault:
    """Mark an environment as broken, while its error is being handled."""
    slot.broken = True
    if isinstance(error, WorkerError):
        return slot.index, f"environment {slot.index}: {error}"
    where = f"environment {slot.index} ({slot.env.where()}) raised in its {doing}"
    return slot.index, f"{where}:\n{traceback.format_exc()}"


class InProcess:
    """The groups of a batch in its own process, with the interface of `WorkerPool`.

    A command runs when its answer is received. Nothing can end an environment that hangs.
    """

    def __init__(
        self, arguments: dict[str, Any], slices: Sequence[range], replay: bool, stages: Sequence[Mapping[str, Any]]
    ) -> None:
        """Make the environments. See `EnvGroup`."""
        self.slices, self.pids = slices, list[int]()
        self.dead: dict[int, EnvError | WorkerError] = {}
        self._groups = [EnvGroup(arguments, indices, replay, stages) for indices in slices]
        self._answers: dict[int, Iterator[Any]] = {}
        self.spec = self._groups[0].spec
        self.blocks = Blocks(self.spec, slices[-1].stop)
        for group in self._groups:
            group.attach(self.blocks)

    def send(self, worker: int, *command: Any) -> None:
        """See `WorkerPool`."""
        self._answers[worker] = self._groups[worker].answers(*command)

    def receive(self, worker: int) -> Any:
        """See `WorkerPool`."""
        return next(self._answers[worker])

    def restart(self, worker: int) -> None:
        """Never called: no process can die."""

    def close(self) -> None:
        """Close the environments."""
        for group in self._groups:
            group.close()
