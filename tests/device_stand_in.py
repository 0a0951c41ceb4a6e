"""A stand-in for a GPU: tensors that say they are on the device "meta", and yet are computed with, on the CPU.

What only a GPU would show can be seen with it anywhere: where the host waits for the device, and where tensors of both
meet in one operation, which CUDA refuses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal"}
"""Operations whose result the host needs, be it the number of its elements."""

NOT_DETERMINISTIC = {f"aten::{name}" for name in ("cumsum", "histc", "median", "put_", "scatter_reduce", "kthvalue")}
"""Operations on CUDA's floats that raise where only deterministic algorithms are allowed."""


class OnDevice(Tensor):
    """A tensor of the CPU as one of the device."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, x: Tensor) -> "OnDevice":
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, x.shape, strides=x.stride(), dtype=x.dtype, device=DEVICE
        )
        self.on_cpu = x
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("computing on the stand-in needs `with StandIn()`")

    def tolist(self) -> Any:
        return self.cpu().tolist()


class StandIn(TorchDispatchMode):
    """``waits``: where the host waited for the device, by operation. ``mixed``: operations on tensors of both.

    ``not_deterministic``: of those that are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self.not_deterministic: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = any(isinstance(x, OnDevice) for x in tensors)
        host = any(not isinstance(x, OnDevice) and x.dim() for x in tensors)  # numbers may meet anything
        if here and name in NOT_DETERMINISTIC and any(x.is_floating_point() for x in tensors):
            self.not_deterministic.append(name)
        result_here = here
        if kwargs.get("device") is not None:
            result_here = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
            if here and not result_here:
                self.waits.append(name)
        elif name == "aten::copy_":
            if here and not isinstance(args[0], OnDevice):
                self.waits.append(name)
        elif here and host:
            self.mixed.append(name)
        elif here and name in WAITS:
            self.waits.append(name)
        result = func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        if name.endswith("_"):
            return args[0] if func._schema.returns else None  # changed in place
        wrap: Callable[[Any], Any] = lambda x: OnDevice(x) if result_here and isinstance(x, Tensor) else x  # noqa: E731
        return tree_map(wrap, result)


def _on_cpu(x: Any) -> Any:
    return x.on_cpu if isinstance(x, OnDevice) else x


def move(module: nn.Module) -> None:
    """Put the module's weights on the device."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(OnDevice(parameter.detach().clone()))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()
