"""Frames by number: a rollout stores each distinct frame once, and the encoder runs once on each.

In MemoryGym most frames repeat. Environments hash what they render; frames with the same 128-bit hash are the same
(two different ones among the 10^7 of a long run share a hash with a probability of about 10^-25), and are numbered in
the order of collection, which depends on neither workers nor time. Encoding a distinct frame once and repeating the
result computes what encoding every step computes; the gradient is the sum over repetitions. On two cores that made
whole iterations of Mortar Mayhem on a grid 2.0 to 4.1 times as fast (README, Speed).
"""

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from ppo_tbptt.envs import BatchedEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.runtime.device import pad_rows
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import Frames, Projected, Rollout

MOST_DISTINCT = 0.6
"""Share of distinct frames in a rollout up to which numbering them pays."""


class FrameTable:
    """The frames of one observation in a rollout, each distinct one once, or all of them.

    Args:
        shape: of a frame.
        limit: frames that are added at most.
        device: where they are stored.
        pinned: in page-locked memory of the host.
    """

    def __init__(self, shape: tuple[int, ...], limit: int, device: torch.device, *, pinned: bool = False) -> None:
        self._limit, self._pinned = limit, pinned
        # Of the host's memory nothing is taken before it is written.
        first = limit if device.type == "cpu" and not pinned else min(limit, 1024)
        self.memory = torch.empty(first, *shape, dtype=torch.uint8, device=device, pin_memory=pinned)
        self._numbers: dict[bytes, int] = {}
        self.clear(distinct=True)

    @property
    def frames(self) -> UInt8[Tensor, "U X Y C"]:
        """Those that were added."""
        return self.memory[: self._count]

    @property
    def num_distinct(self) -> int:
        """How many of the frames differ, as far as hashes were given."""
        return len(self._numbers)

    def clear(self, *, distinct: bool) -> None:
        """Forget all frames; if ``distinct``, store equal ones once from now on, which takes hashes."""
        self.distinct = distinct
        self._count = 0
        self._numbers.clear()

    def add(self, frames: UInt8[Tensor, "N X Y C"], hashes: np.ndarray | None) -> Int[Tensor, "N"]:
        """Store those that are new, and return the number of each frame, on the CPU.

        ``hashes`` are u64 ``[N, 2]``.
        """
        known = self._numbers
        before = len(known)
        keys = [] if hashes is None else hashes.view("V16")[:, 0].tolist()
        numbers = [known.setdefault(key, len(known)) for key in keys]
        if self.distinct:
            first = {number: row for row, number in reversed(list(enumerate(numbers))) if number >= before}
            new = frames[[first[number] for number in range(before, len(known))]]
        else:
            numbers, new = list(range(self._count, self._count + len(frames))), frames
        end = self._count + len(new)
        if end > len(self.memory):
            self._grow(end)
        self.memory[self._count : end].copy_(new, non_blocking=True)
        self._count = end
        return torch.tensor(numbers)

    def _grow(self, least: int) -> None:
        old, size = self.memory, min(self._limit, max(least, 2 * len(self.memory)))
        self.memory = torch.empty(size, *old.shape[1:], dtype=old.dtype, device=old.device, pin_memory=self._pinned)
        self.memory[: len(old)] = old


class FeatureCache:
    """What the agent makes without memory of frames in tables (:meth:`~ppo_tbptt.models.Agent.project`), once each.

    It must be cleared with the tables, and when weights change.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._values: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._counts.clear()

    def project(self, key: str, table: FrameTable, number: Int[Tensor, "N"]) -> Projected:
        """Return the projections of the frames ``number`` of the observation ``key``."""
        frames, device = table.frames, self._agent.device
        done, count = self._counts.get(key, 0), len(frames)
        if done < count:
            new = to_device(frames[done:], device)
            # Few sizes, so that neither cuDNN nor oneDNN prepares for each.
            new = pad_rows(new, 2 ** (count - done - 1).bit_length())
            x = self._agent.project({key: new})[key][: count - done]
            values = self._values.get(key, x[:0])
            if len(values) < count:
                self._values[key] = x.new_empty(len(table.memory), x.shape[1])
                self._values[key][:done] = values[:done]
            self._values[key][done:count] = x
            self._counts[key] = count
        return Projected(self._values[key], to_device(number, device))


class CachedObservations:
    """The current observations of environments for an agent whose weights do not change.

    Args:
        envs: the environments.
        agent: the agent.
        limit: frames whose projections are kept; with more, they are all forgotten.
    """

    def __init__(self, envs: BatchedEnv, agent: Agent, limit: int = 4096) -> None:
        self._envs, self._agent, self._limit = envs, agent, max(limit, envs.num_envs)
        self._cache = FeatureCache(agent)
        shapes = {key: agent.obs_shapes[key] for key in envs.hashes}
        self._tables = {key: FrameTable(shape, self._limit, agent.device) for key, shape in shapes.items()}

    def __call__(self) -> dict[str, Tensor | Projected]:
        """Return copies on the agent's device, and known frames projected."""
        if any(len(table.frames) + self._envs.num_envs > self._limit for table in self._tables.values()):
            self._cache.clear()
            for table in self._tables.values():
                table.clear(distinct=True)
        inputs: dict[str, Tensor | Projected] = {}
        for key, array in self._envs.obs.items():
            x = torch.as_tensor(array)
            if key in self._tables:
                number = self._tables[key].add(x, self._envs.hashes[key])
                inputs[key] = self._cache.project(key, self._tables[key], number)
            else:
                inputs[key] = x.to(self._agent.device, copy=True)
        return inputs


class Observations:
    """Stores what environments show during a rollout, and gives it to the agent.

    Args:
        envs: the environments.
        agent: for which observations are encoded.
        device: where they are stored; the host if that is not the agent's device.
        distinct: store and encode equal frames once; None: the first rollout's share of them decides.
    """

    def __init__(self, envs: BatchedEnv, agent: Agent, device: torch.device, distinct: bool | None) -> None:
        self.distinct = distinct
        self._envs, self._agent, self._device = envs, agent, device
        self._cache = FeatureCache(agent)
        self._tables: dict[str, FrameTable] = {}
        self._numbers: dict[str, Tensor] = {}  # [T + 1, N]

    def begin(self, storage: Rollout) -> None:
        """Forget the rollout before, and the projections of its frames, which were made with other weights."""
        self._storage = storage
        self._cache.clear()
        steps, num_envs = storage.num_steps + 1, storage.num_envs
        for key, x in storage.obs.items():
            if isinstance(x, Frames):
                if key not in self._tables:
                    pinned = self._device != self._agent.device
                    shape = self._agent.obs_shapes[key]
                    self._tables[key] = FrameTable(shape, steps * num_envs, self._device, pinned=pinned)
                self._tables[key].clear(distinct=self.distinct is not False and key in self._envs.hashes)
                self._numbers[key] = torch.full((steps, num_envs), -1)

    def store(self, t: int, rows: slice) -> None:
        """Store what these environments show before step t; after the last step only what bootstrapping needs."""
        for key, x in self._envs.obs.items():
            x = torch.as_tensor(x)[rows]
            if key in self._tables:
                hashes = self._envs.hashes.get(key)
                self._numbers[key][t, rows] = self._tables[key].add(x, None if hashes is None else hashes[rows])
            elif t < self._storage.num_steps:
                # Not waited for: the environments write there again only after the next actions, which wait for it.
                self._storage.obs[key][t, rows].copy_(x, non_blocking=True)

    def inputs(self, t: int, rows: slice) -> dict[str, Tensor | Projected]:
        """Return what these environments show before step t, on the agent's device."""
        inputs: dict[str, Tensor | Projected] = {}
        for key, x in self._storage.obs.items():
            if key not in self._tables:
                last = t == self._storage.num_steps
                x = torch.as_tensor(self._envs.obs[key])[rows] if last else x[t, rows]
                inputs[key] = x.to(self._agent.device, non_blocking=True)
            elif self._tables[key].distinct:
                inputs[key] = self._cache.project(key, self._tables[key], self._numbers[key][t, rows])
            else:
                first, last = self._numbers[key][t, rows][[0, -1]].tolist()
                inputs[key] = to_device(self._tables[key].frames[first : last + 1], self._agent.device)
        return inputs

    def of(self, t: int, n: int) -> dict[str, Tensor]:
        """Return what environment n shows before step t."""
        obs, tables = self._storage.obs, self._tables
        return {
            key: tables[key].frames[self._numbers[key][t, n]] if key in tables else x[t, n] for key, x in obs.items()
        }

    def finish(self) -> tuple[float | None, list[str]]:
        """Give the frames to the rollout.

        Returns:
            The share of distinct ones, None without images or where the environments hash nothing; and a line for the
            user if it has decided that frames are no longer numbered.
        """
        for key, table in self._tables.items():
            self._storage.obs[key] = Frames(table.frames, self._numbers[key][:-1])
        if not any(key in self._envs.hashes for key in self._tables):
            return None, []
        shares = [table.num_distinct / self._numbers[key].numel() for key, table in self._tables.items()]
        share = sum(shares) / len(shares)
        if self.distinct is not None:
            return share, []
        self.distinct = share <= MOST_DISTINCT
        return share, [] if self.distinct else [f"{share:.0%} of the frames differ, so every one is stored and encoded"]
