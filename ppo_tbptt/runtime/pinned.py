"""Asynchronous copies from the host to a GPU, by page-locked memory."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy ``x`` to ``device`` without waiting; return ``x`` itself where it lies there already.

    A copy from pageable memory would wait for all work queued on the GPU. torch caches the page-locked buffer.
    """
    if x.device == device:
        return x
    return x.pin_memory().to(device, non_blocking=True)


class PageLock:
    """Page-locks existing memory, so that copies from it to the GPU are asynchronous.

    Where the driver refuses, it warns and leaves the memory pageable.
    """

    def __init__(self, memory: np.ndarray) -> None:
        """Lock ``memory`` (u8 ``[bytes]``) and keep it alive until `release`."""
        self._memory: np.ndarray | None = memory
        self._runtime: Any = torch.cuda.cudart()
        error = self._runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0)
        if int(error):
            self._memory = None
            warnings.warn(f"the workers' memory could not be page-locked, copies are slower ({error})", stacklevel=2)
            with suppress(RuntimeError):  # clears the error, which the next launch would report again
                torch.zeros(1, device="cuda").add_(1)

    def release(self) -> None:
        """Unlock the pages. May be called again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            torch.cuda.synchronize()  # pending copies still read the memory
            self._runtime.cudaHostUnregister(memory.ctypes.data)
