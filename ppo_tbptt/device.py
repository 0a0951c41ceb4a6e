"""Which device to compute on, and the host made ready for it."""

import ctypes
import re
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class DeviceError(ValueError):
    """One line: the device that was asked for is not there."""


def prepare_device(name: str) -> torch.device:
    """The device of that name, ready for use; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        DeviceError: another name, or CUDA was asked for and is not there, or there are fewer devices.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise DeviceError(f"device: {name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise DeviceError(f"device: {name!r}: this machine or this build of torch has no CUDA; use 'cpu' or 'auto'")
        if device.index is not None and device.index >= count:
            raise DeviceError(f"device: {name!r}: this machine has {count} CUDA device(s), counted from 0")
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 on CUDA and float32 on a CPU.

    A CPU gets float32 even where it has bfloat16 arithmetic, so that one config gives the same numbers on every CPU.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices itself (Linux on x86-64 only; elsewhere unknown, hence False)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return any(line.startswith("flags") and {"avx512_bf16", "amx_bf16"} & set(line.split()) for line in file)
    except OSError:
        return False


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what tensors free, for the next ones.

    By default large tensors are mapped anew each time and unmapped when freed, or given back at the heap's end, and
    the kernel zeroes their pages every time: for the convolutions' activations that can cost as much as the arithmetic.
    32 MiB is the highest threshold that malloc accepts; the process keeps what it once needed.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
