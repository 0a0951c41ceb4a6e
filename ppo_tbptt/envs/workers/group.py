"""Several environments stepped one after the other, in a worker process or in the process of the vector itself."""

import json
import mmap
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from typing import Any

from ppo_tbptt.envs.interface import EnvError, EnvSpec, Episode, Observation, WorkerError
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.workers import ipc as channel
from ppo_tbptt.envs.workers.ipc import Blocks, EnvRequest
from ppo_tbptt.envs.workers.replay import EpisodeJournal, Recorder

_HEARTBEAT_S = 0.2
"""How often a group that replays episodes says that it is alive."""


class EnvGroup:
    """Environments `indices` of a vector: reads actions and seeds from its Blocks, writes everything else to them.

    An environment is idle, its observation zero, from a reset with seed -1 until the next one without.
    """

    def __init__(self, request: EnvRequest, indices: range) -> None:
        """Make the environments.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: the environment's constructor raised; the message holds the traceback.
        """
        self._indices = indices
        self._envs: list[SingleEnv] = []
        self._idle = [True] * len(indices)
        self._blocks: Blocks | None = None
        limit = request.max_episode_steps
        try:
            for _ in indices:
                self._envs.append(make_env(request.env_id, options=request.options, max_episode_steps=limit))
        except EnvError:
            raise
        except (Exception, SystemExit):
            raise WorkerError(f"{request.env_id} could not be made:\n{traceback.format_exc()}") from None
        self._recorders = [Recorder(self.spec) for _ in indices]
        self._journal = request.journal

    @property
    def spec(self) -> EnvSpec:
        """What all of its environments look like."""
        return self._envs[0].spec

    def attach(self, blocks: Blocks) -> None:
        """Work on `blocks` from now on."""
        self._blocks = blocks

    def answers(self, command: bytes) -> Iterator[dict[str, Any] | None]:
        """Do what a vector asks for, and all that it is told of it, as JSON takes it.

        RESET, STEP: one answer, None or `episodes`.  JOURNAL: one, `journals`.
        RESTORE: `restored` (index, exact) for each environment when it is done, and None now and then.
        """
        if command == channel.STEP:
            episodes = self.step()
            yield {"episodes": [astuple(episode) for episode in episodes]} if episodes else None
        elif command == channel.RESET:
            self.reset()
            yield None
        elif command == channel.JOURNAL:
            yield {"journals": [recorder.journal.to_json() for recorder in self._recorders]}
        else:
            assert command.startswith(channel.RESTORE)
            rows = json.loads(command[len(channel.RESTORE) :])
            yield from self.restore([EpisodeJournal.from_json(row, self.spec) for row in rows])

    def reset(self) -> None:
        """Reset every environment with its `next_seeds`; -1 makes it idle."""
        blocks = self._attached
        self._clear_outcomes()
        seeds = blocks.next_seeds[self._slice].tolist()
        for row, seed in enumerate(seeds):
            self._begin(blocks, row, seed)

    def step(self) -> list[Episode]:
        """Step every environment that is not idle; where one finishes, reset it with its `next_seeds`."""
        blocks, episodes, journal = self._attached, [], self._journal
        rewards, terminated, truncated = blocks.reward, blocks.terminated, blocks.truncated
        for row, (index, env) in enumerate(zip(self._indices, self._envs, strict=True)):
            if self._idle[row]:
                rewards[index], terminated[index], truncated[index] = 0.0, False, False
                continue
            action = blocks.action[index]
            with self._blame(index, env, "step"):
                obs, reward, terminated[index], truncated[index], episode = env.step(action)
            rewards[index] = reward
            if episode is None:
                _write(blocks.obs, index, obs)
                if journal:
                    self._recorders[row].add(action, obs, reward)
            else:
                _write(blocks.final_obs, index, obs)
                episodes.append(replace(episode, index=index))
                self._begin(blocks, row, int(blocks.next_seeds[index]))
        return episodes

    def restore(self, journals: list[EpisodeJournal]) -> Iterator[dict[str, Any] | None]:
        """Bring every environment to where its journal ends, or reset it with its `next_seeds` where that fails.

        Yields what `answers` says.
        """
        blocks = self._attached
        self._clear_outcomes()
        for row, journal in enumerate(journals):
            index = self._indices[row]
            if journal.idle:
                self._begin(blocks, row, -1)
                exact = True
            else:
                exact = yield from self._replay(blocks, row, journal)
                if not exact:
                    self._begin(blocks, row, int(blocks.next_seeds[index]))
            yield {"restored": [index, exact]}

    def close(self) -> None:
        """Close the environments."""
        for env in self._envs:
            env.close()

    @property
    def _attached(self) -> Blocks:
        if self._blocks is None:
            raise RuntimeError("attach blocks first")
        return self._blocks

    @property
    def _slice(self) -> slice:
        return slice(self._indices.start, self._indices.stop)

    def _clear_outcomes(self) -> None:
        blocks = self._attached
        blocks.reward[self._slice], blocks.terminated[self._slice], blocks.truncated[self._slice] = 0.0, False, False

    def _begin(self, blocks: Blocks, row: int, seed: int) -> None:
        index, env = self._indices[row], self._envs[row]
        self._idle[row] = seed < 0
        if seed < 0:
            self._recorders[row].begin(-1, {})
            for array in blocks.obs.values():
                array[index] = 0
            return
        with self._blame(index, env, f"reset to level seed {seed}"):
            obs = env.reset(seed)
        if self._journal:
            self._recorders[row].begin(seed, obs)
        _write(blocks.obs, index, obs)

    def _replay(self, blocks: Blocks, row: int, journal: EpisodeJournal) -> Generator[None, None, bool]:
        env, recorder = self._envs[row], self._recorders[row]
        alive = time.monotonic()
        try:
            obs = env.reset(journal.seed)
            recorder.begin(journal.seed, obs)
            for action in journal.actions.astype("int64"):
                obs, reward, _, _, episode = env.step(action)
                if episode is not None:
                    return False
                recorder.add(action, obs, reward)
                if time.monotonic() - alive > _HEARTBEAT_S:
                    yield
                    alive = time.monotonic()
        except (Exception, SystemExit):
            return False  # whatever it is: a new episode will tell whether the environment works
        self._idle[row] = False
        _write(blocks.obs, self._indices[row], obs)
        return recorder.journal.hash == journal.hash

    @contextmanager
    def _blame(self, index: int, env: SingleEnv, action: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            raise WorkerError(f"environment {index}: {error}") from None
        except (Exception, SystemExit):
            where = f"environment {index} ({env.where()}) raised in its {action}"
            raise WorkerError(f"{where}:\n{traceback.format_exc()}") from None


def _write(arrays: dict[str, Any], index: int, obs: Observation) -> None:
    for key, value in obs.items():
        arrays[key][index] = value


class InProcess:
    """See WorkerPool. What is told is done when it is heard, and nothing can end an environment that hangs."""

    def __init__(self, request: EnvRequest, num_envs: int) -> None:
        """Make the environments. Raises like `EnvGroup`."""
        self.slices = [range(num_envs)]
        self.pids: list[int] = []
        self._request = request
        self._group = EnvGroup(request, self.slices[0])
        self._answers: Iterator[Any] = iter(())
        self.spec = self._group.spec
        self.blocks = Blocks(self.spec, num_envs, mmap.mmap(-1, Blocks.size(self.spec, num_envs)))
        self.blocks.poison()
        self._group.attach(self.blocks)

    def tell(self, worker: int, command: bytes) -> None:
        self._answers = self._group.answers(command)

    def hear(self, worker: int) -> Any:
        return next(self._answers)

    def renew(self, worker: int) -> None:
        with suppress(Exception):  # it has failed already: the new ones are what matters
            self._group.close()
        self._group = EnvGroup(self._request, self.slices[0])
        self._group.attach(self.blocks)

    def close(self) -> None:
        self._group.close()
