"""Collective communication between the processes (ranks) that train one agent.

    torchrun --nproc-per-node K scripts/train.py CONFIG

starts K ranks on a machine and describes them in environment variables. CPU tensors and JSON travel over gloo: when a
rank ends, its connections close, and the others fail at their next collective, within an iteration. Gradients and
weights on GPUs travel over NCCL, which does not notice a lost rank; torchrun ends the other ranks then, with SIGTERM
and 30 seconds later with SIGKILL. Nothing is pickled.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.errors import RunError

GLOO_TIMEOUT = timedelta(hours=24)
"""Limit of waiting for a busy rank, such as rank 0 while it evaluates."""
NCCL_TIMEOUT = timedelta(minutes=10)
"""Limit of waiting within an update."""


class DistributedError(RunError):
    """One line: the ranks can't communicate, usually because one has ended."""


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a run, and their collectives; ``World()`` is a single process.

    All ranks must call the same methods in the same order. Collectives raise :class:`DistributedError` where another
    rank has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank within this machine, and index of its GPU."""
    local_size: int = 1
    nccl: dist.ProcessGroup | None = None
    """Process group for tensors on GPUs."""

    @classmethod
    def join(cls) -> "World":
        """Join the process group that torchrun's environment variables describe; a single process without them.

        Raises:
            DistributedError: the variables are invalid, or a rank is missing.
        """
        env = os.environ
        if "RANK" not in env or env.get("WORLD_SIZE", "1") == "1":
            return cls()
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            world = cls(rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)))
        except ValueError as error:
            raise DistributedError(f"RANK, WORLD_SIZE and the like, which torchrun sets: {error}") from error
        # Import it before there is a process group. torch imports it with the first optimizer otherwise, its functions
        # keep that group as a default argument, and the group's threads can crash the process at exit.
        import_module("torch.distributed.nn.functional")
        with world._communicating():
            dist.init_process_group("gloo", timeout=GLOO_TIMEOUT, rank=rank, world_size=size)
        return world

    def device_name(self, name: str) -> str:
        """Return the name of this rank's device, given the config's ``device``: each rank has a GPU of its own.

        Raises:
            DeviceError: ``name`` is a single GPU, and there are several ranks.
        """
        if self.size == 1 or name == "cpu":
            return name
        if name not in ("auto", "cuda"):
            raise DeviceError(f'device: {name!r}: {self.size} ranks need a device each; use "cuda", "auto" or "cpu"')
        return f"cuda:{self.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def with_device(self, device: torch.device) -> "World":
        """Return this world with a process group for tensors on ``device``."""
        if self.size == 1 or device.type != "cuda":
            return self
        torch.cuda.set_device(device)
        with self._communicating():
            return replace(self, nccl=dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT))

    def sum_(self, x: Tensor) -> Tensor:
        """All-reduce ``x`` in place to its sum over all ranks, with the same bits on each."""
        if self.size > 1:
            self.start_sum_(x)()
        return x

    def start_sum_(self, x: Tensor) -> Callable[[], None]:
        """Start `sum_` asynchronously and return a function that waits for it, in the same order on all ranks."""
        with self._communicating():
            work = dist.all_reduce(x, group=self.nccl if x.is_cuda else None, async_op=True)

        def wait() -> None:
            with self._communicating():
                work.wait()  # type: ignore[union-attr]

        return wait

    def broadcast_(self, x: Tensor) -> None:
        """Broadcast rank 0's ``x`` into ``x``."""
        if self.size > 1:
            with self._communicating():
                dist.broadcast(x, 0, group=self.nccl if x.is_cuda else None)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Gather ``x`` (on the CPU, with equal shapes) of all ranks, by rank."""
        if self.size == 1:
            return [x]
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        with self._communicating():
            dist.all_gather(gathered, x.contiguous())
        return gathered

    def gather_rows(self, x: Tensor) -> list[Tensor]:
        """Gather ``x`` (on the CPU, with equal shapes except for the first axis) of all ranks, by rank."""
        if self.size == 1:
            return [x]
        lengths = [int(n) for n in self.gather(torch.tensor(len(x)))]
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        return [rows[:n] for rows, n in zip(self.gather(padded), lengths, strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        """Gather the JSON ``value`` of all ranks, by rank; the first one is a broadcast from rank 0."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(bytes(x.numpy())) for x in self.gather_rows(text)]

    def largest(self, value: int) -> int:
        """Return the largest ``value`` of all ranks."""
        return max(int(x) for x in self.gather(torch.tensor(value)))

    def variance(self, x: Tensor) -> float:
        """Return the unbiased variance of the elements of all ranks' ``x``; each rank has equally many."""
        if self.size == 1:
            return float(x.var())
        x = x.double()
        count = x.numel() * self.size
        mean = self.sum_(x.sum()) / count
        return float(self.sum_((x - mean).square().sum()) / (count - 1))

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Raise torch's errors of communication as :class:`DistributedError`."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise DistributedError(f"rank {self.rank} of {self.size}: another rank is gone ({reason})") from error

    def __enter__(self) -> "World":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error NCCL could wait for a lost rank; the end of the process closes the group as well.
        if self.size > 1 and (kind is None or not torch.cuda.is_initialized()):
            dist.destroy_process_group()
