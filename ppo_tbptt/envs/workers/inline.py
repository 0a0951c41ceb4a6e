"""A vector's environments in its own process, behind the interface of WorkerPool: as a single worker that is none."""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ppo_tbptt.envs.workers.blocks import Blocks
from ppo_tbptt.envs.workers.group import EnvGroup
from ppo_tbptt.envs.workers.request import EnvRequest


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
