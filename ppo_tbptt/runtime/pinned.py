"""Copies between the host and a GPU that don't make the host wait."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on ``device``; what lies there already is returned as it is.

    A copy from ordinary memory waits until the GPU has done everything before it; one from page-locked memory does
    not, and torch keeps such memory for the next copy once this one is done.
    """
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True)


class PageLock:
    """Locks the pages of memory that is there already, so that the GPU reads it by itself.

    Where the driver refuses, a warning says so, and copies from there go through a buffer of the driver's.
    """

    def __init__(self, memory: np.ndarray) -> None:
        """``memory``: u8 ``[bytes]``, kept alive until it is released."""
        self._memory: np.ndarray | None = memory
        self._runtime: Any = torch.cuda.cudart()
        error = self._runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(error):
            self._memory = None
            warnings.warn(f"the workers' memory could not be page-locked, copies are slower ({error})", stacklevel=2)
            with suppress(RuntimeError):  # the next launch reports the error once more
                torch.zeros(1, device="cuda").add_(1)

    def release(self) -> None:
        """Unlock the pages. Harmless when repeated."""
        memory, self._memory = self._memory, None
        if memory is not None:
            torch.cuda.synchronize()  # nothing may still be read from there
            self._runtime.cudaHostUnregister(memory.ctypes.data)
