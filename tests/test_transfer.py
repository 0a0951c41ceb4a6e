"""Page-locking, against a stand-in for CUDA's runtime."""

from typing import Any

import numpy as np
import pytest
import torch

from ppo_tbptt.runtime.pinned import PageLock


class Runtime:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.calls.append(("wait",)))

    def cudaHostRegister(self, *args: int) -> int:
        self.calls.append(("lock", *args))
        return self.error

    def cudaHostUnregister(self, *args: int) -> int:
        self.calls.append(("unlock", *args))
        return 0


def test_memory_is_locked_once_and_unlocked_once_when_nothing_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, memory = Runtime(monkeypatch), np.zeros(4096, np.uint8)
    lock = PageLock(memory)
    lock.release()
    lock.release()
    where = memory.ctypes.data
    assert cuda.calls == [("lock", where, 4096, 0), ("wait",), ("unlock", where)]


def test_a_driver_that_refuses_costs_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Runtime(monkeypatch, error=1)

    def launch(*args: Any, **kwargs: Any) -> None:
        cuda.calls.append(("launch",))
        raise RuntimeError("CUDA reports the refusal once more")

    monkeypatch.setattr(torch, "zeros", launch)
    with pytest.warns(UserWarning, match="could not be page-locked, copies are slower"):
        lock = PageLock(np.zeros(4096, np.uint8))
    lock.release()
    assert [call[0] for call in cuda.calls] == ["lock", "launch"]
