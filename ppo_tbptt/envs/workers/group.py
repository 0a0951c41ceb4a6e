"""Several environments stepped one after the other, in a worker process or in the process of the vector itself."""

import json
import mmap
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, replace
from typing import Any

from ppo_tbptt.envs.interface import EnvError, EnvSpec, Observation, WorkerError
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.workers import ipc
from ppo_tbptt.envs.workers.ipc import Blocks, EnvRequest
from ppo_tbptt.envs.workers.replay import EpisodeRecorder, EpisodeReplay

_HEARTBEAT_S = 0.2
"""How often a group that replays episodes sends a sign of life."""


class EnvGroup:
    """Environments `indices` of a vector: reads actions and seeds from its Blocks, writes everything else to them.

    An environment is idle, its observation zero, until it begins an episode, and after one with seed -1. One that
    fails is left alone until it is to begin an episode again, and is made anew then.
    """

    def __init__(self, request: EnvRequest, indices: range) -> None:
        """Make the environments.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: an environment could not be made; the message holds the traceback.
        """
        self._request, self._indices = request, indices
        try:
            self._envs = [self._make() for _ in indices]
        except EnvError:
            raise
        except (Exception, SystemExit):
            raise WorkerError(f"{request.env_id} could not be made:\n{traceback.format_exc()}") from None
        self._idle = [True] * len(indices)
        self._broken = [False] * len(indices)
        self._recorders = [EpisodeRecorder(self.spec) for _ in indices]

    @property
    def spec(self) -> EnvSpec:
        """What all of its environments look like."""
        return self._envs[0].spec

    def attach(self, blocks: Blocks) -> None:
        """Work on `blocks` from now on."""
        self._blocks = blocks

    def answers(self, command: bytes) -> Iterator[dict[str, Any] | None]:
        """Run a command of the vector, and yield its answers, as JSON takes them.

        STEP, BEGIN: one, `episodes` that ended and `faults` (index, text), None without either.
        REPLAYS: one, `replays`.
        RESTORE: `restored` (index, exact) for each environment when it is done, and None now and then.
        """
        kind, arguments = command[:1], command[1:]
        if kind == ipc.STEP:
            yield self._step()
        elif kind == ipc.BEGIN:
            faults: list[list[Any]] = []
            for index, seed in json.loads(arguments):
                self._begin(index - self._indices.start, seed, faults)
            yield {"episodes": [], "faults": faults} if faults else None
        elif kind == ipc.REPLAYS:
            yield {"replays": [recorder.replay.to_json() for recorder in self._recorders]}
        else:
            assert kind == ipc.RESTORE
            for row, data in enumerate(json.loads(arguments)):
                exact = yield from self._restore(row, EpisodeReplay.from_json(data, self.spec))
                yield {"restored": [self._indices[row], exact]}

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    def _make(self) -> SingleEnv:
        request = self._request
        return make_env(request.env_id, options=request.options, max_episode_steps=request.max_episode_steps)

    def _step(self) -> dict[str, Any] | None:
        """Step every environment that is not idle; where one finishes, begin with its `next_seeds`."""
        blocks, replay = self._blocks, self._request.replay
        rewards, terminated, truncated = blocks.reward, blocks.terminated, blocks.truncated
        episodes: list[Any] = []
        faults: list[list[Any]] = []
        for row, (index, env) in enumerate(zip(self._indices, self._envs, strict=True)):
            if self._idle[row]:
                rewards[index], terminated[index], truncated[index] = 0.0, False, False
                continue
            action = blocks.action[index]
            try:
                obs, reward, terminated[index], truncated[index], episode = env.step(action)
            except (Exception, SystemExit) as error:
                faults.append(self._fault(row, "step", error))
                continue
            rewards[index] = reward
            if episode is None:
                _write(blocks.obs, index, obs)
                if replay:
                    self._recorders[row].add(action, obs, reward)
            else:
                _write(blocks.final_obs, index, obs)
                episodes.append(astuple(replace(episode, index=index)))
                self._begin(row, int(blocks.next_seeds[index]), faults)
        return {"episodes": episodes, "faults": faults} if episodes or faults else None

    def _begin(self, row: int, seed: int, faults: list[list[Any]]) -> None:
        index = self._indices[row]
        self._idle[row] = seed < 0
        if seed < 0:
            self._recorders[row].begin(-1, {})
            for array in self._blocks.obs.values():
                array[index] = 0
            return
        try:
            if self._broken[row]:
                self._make_anew(row)
            obs = self._envs[row].reset(seed)
        except (Exception, SystemExit) as error:
            faults.append(self._fault(row, f"reset to level seed {seed}", error))
            return
        if self._request.replay:
            self._recorders[row].begin(seed, obs)
        _write(self._blocks.obs, index, obs)

    def _make_anew(self, row: int) -> None:
        with suppress(Exception):  # it has failed already
            self._envs[row].close()
        env, spec = self._make(), self._envs[row].spec
        if env.spec != spec:
            raise WorkerError(f"it was made anew, and looks different: {env.spec}, not {spec}")
        self._envs[row], self._broken[row] = env, False

    def _restore(self, row: int, replay: EpisodeReplay) -> Generator[None, None, bool]:
        """Replay an episode, and return whether the environment is where it was."""
        if replay.idle:
            self._begin(row, -1, [])
            return True
        env, recorder = self._envs[row], self._recorders[row]
        alive = time.monotonic()
        try:
            obs = env.reset(replay.seed)
            recorder.begin(replay.seed, obs)
            for action in replay.actions.astype("int64"):
                obs, reward, _, _, episode = env.step(action)
                if episode is not None:
                    return False
                recorder.add(action, obs, reward)
                if time.monotonic() - alive > _HEARTBEAT_S:
                    yield
                    alive = time.monotonic()
        except (Exception, SystemExit):
            self._broken[row] = True
            return False  # a new episode will tell whether the environment works
        self._idle[row] = False
        _write(self._blocks.obs, self._indices[row], obs)
        return recorder.replay.hash == replay.hash

    def _fault(self, row: int, doing: str, error: BaseException) -> list[Any]:
        """Mark an environment as broken, while its error is being handled. Returns its index and a text."""
        index, self._broken[row] = self._indices[row], True
        if isinstance(error, WorkerError):
            return [index, f"environment {index}: {error}"]
        where = f"environment {index} ({self._envs[row].where()}) raised in its {doing}"
        return [index, f"{where}:\n{traceback.format_exc()}"]


def _write(arrays: dict[str, Any], index: int, obs: Observation) -> None:
    for key, value in obs.items():
        arrays[key][index] = value


class InProcess:
    """The groups of a vector in its own process, with the interface of `WorkerPool`.

    A command runs when its answer is received. Nothing can end an environment that hangs.
    """

    def __init__(self, request: EnvRequest, slices: Sequence[range]) -> None:
        """Make the environments. Raises like `EnvGroup`."""
        self.slices, self.pids = list(slices), list[int]()
        self._groups = [EnvGroup(request, indices) for indices in slices]
        self._answers: dict[int, Iterator[Any]] = {}
        self.spec, num_envs = self._groups[0].spec, slices[-1].stop
        self.blocks = Blocks(self.spec, num_envs, mmap.mmap(-1, Blocks.size(self.spec, num_envs)))
        self.blocks.poison()
        for group in self._groups:
            group.attach(self.blocks)

    def send(self, worker: int, command: bytes) -> None:
        """See `WorkerPool`."""
        self._answers[worker] = self._groups[worker].answers(command)

    def receive(self, worker: int) -> Any:
        """See `WorkerPool`."""
        return next(self._answers[worker])

    def restart(self, worker: int) -> None:
        """Never called: no process can die."""
        raise AssertionError(f"there is no worker {worker} to restart")

    def close(self) -> None:
        """Close the environments."""
        for group in self._groups:
            group.close()
