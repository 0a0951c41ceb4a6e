"""Selection of device and precision, process-wide settings for them, and versions."""

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from ppo_tbptt.runtime.errors import InputError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class DeviceError(InputError):
    """One line: the requested device does not exist."""


def prepare_device(name: str, *, deterministic: bool = False) -> torch.device:
    """Select a device and prepare the process for it.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``, which is CUDA where available, else the CPU.
        deterministic: restrict the process to deterministic CUDA algorithms.

    Raises:
        DeviceError: invalid name, no CUDA, or no such device.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name, re.ASCII):
        raise DeviceError(f"device: {name!r}: use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        _keep_freed_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"device: {name!r}: this machine or this build of torch has no CUDA; use 'cpu' or 'auto'")
    index = int(name[5:]) if ":" in name else torch.cuda.current_device()
    if index >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device: {name!r}: this machine has {count} CUDA device(s), counted from 0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)  # streams and graphs are created on the current device
    if deterministic:
        # cuBLAS reads it at its first matrix product. Of the two values that make such products deterministic,
        # recurrent cores accept only this one.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of ``float32``, ``bfloat16`` or ``auto``, which is bfloat16 on CUDA and float32 on a CPU.

    ``auto`` ignores a CPU's bfloat16 arithmetic, so that one config gives the same numbers on every CPU.
    """
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextmanager
def tf32(precision: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let cuDNN round float32 to TF32's 10 bits inside, or not: only where ``precision`` is bfloat16.

    By default CUDA's convolutions and recurrent cores do so. The setting is the whole process's, hence only for the
    calls of one agent; backward passes need it too.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == torch.bfloat16
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def versions(device: torch.device) -> str:
    """List what numbers depend on besides the config, line by line: versions of packages, and the hardware's name."""
    lines = [f"python {platform.python_version()}"]
    for name in ("ppo-tbptt", "torch", "numpy", "gymnasium", "memory-gym"):
        with suppress(PackageNotFoundError):
            lines.append(f"{name} {version(name)}")
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    cpu = names[0] if names else platform.machine()
    return "\n".join([*lines, f"{device}: {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}"])


def _cpuinfo() -> list[str]:
    """Read the lines of ``/proc/cpuinfo``; empty on systems without it."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="ascii", errors="replace").splitlines() if path.exists() else []


def storage_device(name: str, num_bytes: int, device: torch.device) -> torch.device:
    """Choose where ``num_bytes`` of observations are stored, ``device`` or the host; ``name`` is ``Config.storage``.

    ``auto`` takes up to half of a GPU's free memory; the update needs the rest.
    """
    if device.type == "cpu" or name == "device":
        return device
    fits = name == "auto" and num_bytes <= 0.5 * torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


def has_fast_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 matrix instructions; detected on x86-64 Linux only, else False."""
    return any(line.startswith("flags") and {"avx512_bf16", "amx_bf16"} & set(line.split()) for line in _cpuinfo())


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory for later tensors instead of returning it to the system.

    By default each large tensor is mapped anew and the kernel zeroes its pages, which can cost as much as the
    arithmetic of a convolution. 32 MiB is the highest mmap threshold that malloc accepts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform.startswith("linux") and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    """Append rows of zeros up to a multiple of ``multiple``.

    oneDNN, which multiplies in bfloat16 on a CPU, compiles a kernel for every new shape: 0.3 ms, which is longer than
    it then takes to run.
    """
    padding = -len(x) % multiple
    return torch.cat((x, x.new_zeros(padding, *x.shape[1:]))) if padding else x
