"""Several environments stepped one after the other, in a worker process or in the process of the vector itself."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ppo_tbptt.envs.blocks import Blocks
from ppo_tbptt.envs.errors import EnvError, WorkerError
from ppo_tbptt.envs.single import SingleEnv, make_env
from ppo_tbptt.envs.spec import EnvSpec, Episode, Observation


class EnvGroup:
    """Environments `indices` of a vector: reads actions and seeds from its Blocks, writes everything else to them.

    An environment is idle, its observation zero, from a reset with seed -1 until the next one without.
    """

    def __init__(
        self, env_id: str, options: Mapping[str, Any] | None, max_episode_steps: int | None, indices: range
    ) -> None:
        """Make the environments.

        Raises:
            EnvError: the request cannot be met.
            WorkerError: the environment's constructor raised; the message holds the traceback.
        """
        self._indices = indices
        self._envs: list[SingleEnv] = []
        self._idle = [True] * len(indices)
        self._blocks: Blocks | None = None
        try:
            for _ in indices:
                self._envs.append(make_env(env_id, options=options, max_episode_steps=max_episode_steps))
        except EnvError:
            raise
        except Exception:
            raise WorkerError(f"{env_id} could not be made:\n{traceback.format_exc()}") from None

    @property
    def spec(self) -> EnvSpec:
        """What all of its environments look like."""
        return self._envs[0].spec

    def attach(self, blocks: Blocks) -> None:
        """Work on `blocks` from now on."""
        self._blocks = blocks

    def reset(self) -> None:
        """Reset every environment with its `next_seeds`; -1 makes it idle."""
        blocks = self._attached
        blocks.reward[self._slice], blocks.terminated[self._slice], blocks.truncated[self._slice] = 0.0, False, False
        seeds = blocks.next_seeds[self._slice].tolist()
        for row, seed in enumerate(seeds):
            self._begin(blocks, row, seed)

    def step(self) -> list[Episode]:
        """Step every environment that is not idle; where one finishes, reset it with its `next_seeds`."""
        blocks, episodes = self._attached, []
        reward, terminated, truncated = blocks.reward, blocks.terminated, blocks.truncated
        for row, (index, env) in enumerate(zip(self._indices, self._envs, strict=True)):
            if self._idle[row]:
                reward[index], terminated[index], truncated[index] = 0.0, False, False
                continue
            with self._blame(index, env, "step"):
                obs, reward[index], terminated[index], truncated[index], episode = env.step(blocks.action[index])
            if episode is None:
                _write(blocks.obs, index, obs)
            else:
                _write(blocks.final_obs, index, obs)
                episodes.append(replace(episode, index=index))
                self._begin(blocks, row, int(blocks.next_seeds[index]))
        return episodes

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

    def _begin(self, blocks: Blocks, row: int, seed: int) -> None:
        index, env = self._indices[row], self._envs[row]
        self._idle[row] = seed < 0
        if seed < 0:
            for array in blocks.obs.values():
                array[index] = 0
            return
        with self._blame(index, env, f"reset to level seed {seed}"):
            obs = env.reset(seed)
        _write(blocks.obs, index, obs)

    @contextmanager
    def _blame(self, index: int, env: SingleEnv, action: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            raise WorkerError(f"environment {index}: {error}") from None
        except Exception:
            where = f"environment {index} ({env.where()}) raised in its {action}"
            raise WorkerError(f"{where}:\n{traceback.format_exc()}") from None


def _write(arrays: dict[str, Any], index: int, obs: Observation) -> None:
    for key, value in obs.items():
        arrays[key][index] = value
