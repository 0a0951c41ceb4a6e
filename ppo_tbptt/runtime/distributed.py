"""Several processes (ranks) that train one agent: who they are, and what they tell each other.

    torchrun --nproc-per-node K scripts/train.py CONFIG

starts K of them on a machine and describes them in environment variables. Control figures travel between CPUs over
gloo, whatever the device: a rank that ends, however it ends, closes its connections, which the others notice at their
next exchange, that is within an iteration. Only gradients and weights on GPUs travel over nccl. It does not notice by
itself; there torchrun ends the other ranks, with SIGTERM and 30 seconds later with SIGKILL.

Nothing is ever pickled: what travels are tensors, and text.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ppo_tbptt.runtime.device import DeviceError
from ppo_tbptt.runtime.errors import RunError

PATIENCE = timedelta(hours=24)
"""How long a rank waits for one that is there but busy, such as rank 0 while it evaluates."""
NCCL_PATIENCE = timedelta(minutes=10)
"""The same within an update."""


class DistributedError(RunError):
    """One line: this rank can't go on, because another one is gone."""


@dataclass(frozen=True, slots=True)
class World:
    """The ranks of a run; ``World()`` is a process that trains alone, and exchanges nothing.

    All ranks must call the same methods in the same order. Each raises :class:`DistributedError` where another rank
    is gone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine: the number of its GPU."""
    local_size: int = 1
    nccl: dist.ProcessGroup | None = None
    """For tensors on GPUs; see :meth:`using`."""

    @classmethod
    def join(cls) -> "World":
        """Meet the other ranks that torchrun's environment variables tell of; alone where there are none."""
        env = os.environ
        if "RANK" not in env or env.get("WORLD_SIZE", "1") == "1":
            return cls()
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            world = cls(rank, size, int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size)))
        except ValueError as error:
            raise DistributedError(f"RANK, WORLD_SIZE and the like, which torchrun sets: {error}") from error
        # Its functions have the group that exists when they are imported as a default: where torch imports it later
        # (with the first optimiser), the group outlives its destruction, and its threads can crash the process's end.
        import_module("torch.distributed.nn.functional")
        with world._talking():
            dist.init_process_group("gloo", timeout=PATIENCE, rank=rank, world_size=size)
        return world

    def device_name(self, name: str) -> str:
        """The config's ``device`` for this rank: several on one machine have a GPU each.

        Raises:
            DeviceError: one GPU was named for all.
        """
        if self.size == 1 or name == "cpu":
            return name
        if name not in ("auto", "cuda"):
            raise DeviceError(f'device: {name!r}: {self.size} ranks need a device each; use "cuda", "auto" or "cpu"')
        return f"cuda:{self.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def using(self, device: torch.device) -> "World":
        """This world, able to exchange tensors on ``device``."""
        if self.size == 1 or device.type != "cuda":
            return self
        torch.cuda.set_device(device)
        with self._talking():
            return replace(self, nccl=dist.new_group(backend="nccl", timeout=NCCL_PATIENCE))

    def sum_(self, x: Tensor) -> Tensor:
        """Replace ``x`` by its sum over all ranks: the same bits on each."""
        if self.size > 1:
            with self._talking():
                dist.all_reduce(x, group=self.nccl if x.is_cuda else None)
        return x

    def start_sum_(self, x: Tensor) -> Callable[[], None]:
        """Begin what `sum_` does; what is returned waits for it. All ranks begin and wait in the same order."""
        with self._talking():
            work = dist.all_reduce(x, group=self.nccl if x.is_cuda else None, async_op=True)

        def wait() -> None:
            with self._talking():
                work.wait()  # type: ignore[union-attr]

        return wait

    def broadcast_(self, x: Tensor) -> None:
        """Replace ``x`` by rank 0's."""
        if self.size > 1:
            with self._talking():
                dist.broadcast(x, 0, group=self.nccl if x.is_cuda else None)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's ``x``, by rank; on the CPU, and of one shape."""
        if self.size == 1:
            return [x]
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(gathered, x.contiguous())
        return gathered

    def gather_rows(self, x: Tensor) -> list[Tensor]:
        """Like `gather`, where the ranks have different numbers of rows (and rank 0 has the same row shape)."""
        if self.size == 1:
            return [x]
        lengths = [int(n) for n in self.gather(torch.tensor(len(x)))]
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        return [rows[:n] for rows, n in zip(self.gather(padded), lengths, strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (lists, dicts with text keys, text and numbers), by rank. Rank 0's is a broadcast."""
        if self.size == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gather(torch.tensor(len(text)))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(text)] = text
        return [json.loads(bytes(x[:n].numpy())) for x, n in zip(self.gather(padded), lengths, strict=True)]

    def largest(self, value: int) -> int:
        """The largest of every rank's ``value``."""
        return max(int(x) for x in self.gather(torch.tensor(value)))

    def variance(self, x: Tensor) -> float:
        """The unbiased variance of the elements of every rank's ``x``, which are equally many."""
        if self.size == 1:
            return float(x.var())
        x = x.double()
        count = x.numel() * self.size
        mean = self.sum_(x.sum()) / count
        return float(self.sum_((x - mean).square().sum()) / (count - 1))

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise DistributedError(f"rank {self.rank} of {self.size}: another rank is gone ({reason})") from error

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # With a rank missing nccl would wait for it; the end of the process closes everything as well.
        if self.size > 1 and (kind is None or not torch.cuda.is_initialized()):
            dist.destroy_process_group()
