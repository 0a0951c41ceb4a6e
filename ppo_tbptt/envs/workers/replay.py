"""Episode replays: what brings an environment back into the middle of its episode, and tells whether it did."""

import struct
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ppo_tbptt.envs.interface import EnvSpec, Observation

_float32 = struct.Struct("<f").pack


class EpisodeReplay(NamedTuple):
    """An unfinished episode: a reset with `seed`, then `actions`, lead to where its environment is.

    seed: level seed, -1 where the environment is idle.
    actions: integers [steps, A], each branch counting from 0.
    digest: hash of all observations and rewards since the reset; 0 where nobody knows, which no replay matches.
    stage: whose options the reset has, see `Episode`.
    """

    seed: int
    actions: np.ndarray
    digest: int
    stage: int = 0


class EpisodeRecorder:
    """Records the replay of one environment: well under a microsecond per step, and a byte per action branch."""

    def __init__(self, spec: EnvSpec) -> None:
        self._branches, choices = len(spec.action_nvec), max(spec.action_nvec)
        self._typecode = "B" if choices <= 2**8 else "H" if choices <= 2**16 else "l"
        self.begin(-1, {})

    def begin(self, seed: int, obs: Observation, stage: int = 0) -> None:
        """Begin an episode of the level `seed` with its first observation; -1 without one for an idle environment."""
        self._seed, self._stage = seed, stage
        self._actions = array(self._typecode)
        self._hash = xxhash.xxh3_64()
        for value in obs.values():
            self._hash.update(value.data)

    def add(self, action: np.ndarray, obs: Observation, reward: float) -> None:
        """Add a step: `action` (i64 [A]) led to `obs` and `reward`."""
        self._actions.extend(action.tolist())
        update = self._hash.update
        for value in obs.values():
            update(value.data)
        update(_float32(reward))

    @property
    def replay(self) -> EpisodeReplay:
        """The episode so far; later steps do not change it. Actions are u8 where that suffices, else u16 or i64."""
        actions = np.array(self._actions).reshape(-1, self._branches)
        return EpisodeReplay(self._seed, actions, self._hash.intdigest(), self._stage)


def pack(replays: Sequence[EpisodeReplay]) -> dict[str, np.ndarray]:
    """Convert to arrays: `seed`, `stage`, `steps`, `digest` i64 [N], `actions` [sum of steps, A] in the order of N."""
    return {
        "seed": np.array([replay.seed for replay in replays], np.int64),
        "stage": np.array([replay.stage for replay in replays], np.int64),
        "steps": np.array([len(replay.actions) for replay in replays], np.int64),
        "digest": np.array([replay.digest for replay in replays], np.uint64).view(np.int64),
        "actions": np.concatenate([replay.actions for replay in replays]),
    }


def unpack(state: Mapping[str, Any], spec: EnvSpec, num_envs: int) -> list[EpisodeReplay]:
    """Invert `pack`. Without `stage`, as before there were any, all are 0.

    Raises:
        ValueError, KeyError: `state` is of another number of environments or action branches, or no state at all.
    """
    seeds, steps, digests, actions = (np.asarray(state[key]) for key in ("seed", "steps", "digest", "actions"))
    if len(steps) != num_envs:
        raise ValueError(f"episodes of {len(steps)} environments, not {num_envs}")
    if actions.ndim != 2 or actions.shape[1] != len(spec.action_nvec) or actions.dtype.kind not in "iu":
        expected = f"(steps, {len(spec.action_nvec)})"
        raise ValueError(f"actions must be integers of shape {expected}, not {actions.dtype} of shape {actions.shape}")
    stages = np.asarray(state.get("stage", np.zeros_like(seeds)))
    parts = np.split(actions, np.cumsum(steps)[:-1])
    digests = digests.astype(np.int64).view(np.uint64)
    rows = zip(seeds.tolist(), parts, digests.tolist(), stages.tolist(), strict=True)
    return [EpisodeReplay(*row) for row in rows]
