"""Copies between the host and a GPU that don't make the host wait."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` (on the CPU) on ``device``; the CPU's own tensors are returned as they are.

    A copy from ordinary memory waits until the GPU has done everything before it; one from page-locked memory does
    not, and torch keeps such memory for the next copy once this one is done.
    """
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)
