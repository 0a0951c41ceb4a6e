"""Recurrent cores. Their state is one flat vector per sequence, packed and unpacked here and nowhere else.

A new cell is one class with the interface of :class:`Core` and one entry in ``CORES``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ppo_tbptt.runtime.pinned import to_device


class Core(nn.Module, ABC):
    """What turns features into features with memory.

    ``state_size`` (D) is the width of the state, 0 for no memory; ``output_size`` (H) the width of the output.
    """

    state_size: int
    output_size: int
    pads: bool = True
    """Whether ``unroll`` computes padded steps; False where a core has its own way with packed sequences."""

    def initial_state(self, batch: int) -> Float[Tensor, "B D"]:
        """The state at the start of an episode."""
        return next(self.parameters()).new_zeros(batch, self.state_size)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "L B F"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """Unroll over L steps from ``state``; the state returned is the one after the last step."""
        raise NotImplementedError

    def unroll(
        self, x: Float[Tensor, "M F"], state: Float[Tensor, "S D"], batch_sizes: Int[Tensor, "L"]
    ) -> Float[Tensor, "M H"]:
        """Outputs of packed sequences (see :class:`~ppo_tbptt.types.Minibatch`), each from its own ``state``.

        This pads them at their tails, where nothing comes after; a core that computes packed sequences overrides it.
        The only place where padding exists.
        """
        longest, most = len(batch_sizes), len(state)
        if len(x) == longest * most:
            return self(x.view(longest, most, -1), state)[0].flatten(0, 1)
        valid = torch.arange(most) < batch_sizes[:, None]  # [L, S]
        position = to_device(valid.flatten().nonzero().squeeze(1), x.device)  # [M], into [L * S]
        padded = x.new_zeros(longest * most, x.shape[1]).index_copy(0, position, x)
        return self(padded.view(longest, most, -1), state)[0].flatten(0, 1).index_select(0, position)


class NoMemory(Core):
    """The identity, with a state of width 0: PPO without recurrence."""

    pads = False

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.state_size = 0
        self.output_size = input_size
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def initial_state(self, batch: int) -> Float[Tensor, "B D"]:
        return self.get_buffer("_like").new_zeros(batch, 0)

    def forward(
        self, x: Float[Tensor, "L B F"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        return x, state

    def unroll(
        self, x: Float[Tensor, "M F"], state: Float[Tensor, "S D"], batch_sizes: Int[Tensor, "L"]
    ) -> Float[Tensor, "M H"]:
        return x


class TorchCore(Core):
    """``torch.nn``'s RNN, GRU or LSTM. The state is laid out as ``[part, layer, hidden]`` (parts: h, and c of LSTM)."""

    pads = False

    def __init__(self, rnn: nn.RNN | nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.rnn = rnn
        self._parts = 2 if isinstance(rnn, nn.LSTM) else 1
        self.state_size = self._parts * rnn.num_layers * rnn.hidden_size
        self.output_size = rnn.hidden_size
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, 2**0.5)

    def forward(
        self, x: Float[Tensor, "L B F"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        y, after = self._run(x, state)
        stacked = torch.stack(after) if self._parts == 2 else after[None]
        return y, stacked.permute(2, 0, 1, 3).reshape(x.shape[1], self.state_size)

    def unroll(
        self, x: Float[Tensor, "M F"], state: Float[Tensor, "S D"], batch_sizes: Int[Tensor, "L"]
    ) -> Float[Tensor, "M H"]:
        if len(x) == len(batch_sizes) * len(state):
            return super().unroll(x, state, batch_sizes)  # nothing to pad, and plain tensors are faster
        return self._run(PackedSequence(x, batch_sizes), state)[0].data

    def _run(self, x: Any, state: Float[Tensor, "S D"]) -> Any:
        """The module's own call; on CUDA always in the weights' float32, on TF32's tensor cores where the agent's
        precision is bfloat16 (see :func:`~ppo_tbptt.runtime.device.prepare_precision`).

        Inside of autocast cuDNN would compute in float16, whatever type autocast asks for (PyTorch's
        ``_cudnn_rnn_cast_reflatten``, up to 2.11 at least), where gradients underflow without loss scaling.
        """
        if not state.is_cuda:
            return self.rnn(x, self._unpack(state))
        with torch.autocast("cuda", enabled=False):
            return self.rnn(x.to(self.rnn.get_parameter("weight_hh_l0").dtype), self._unpack(state))

    def _unpack(self, state: Float[Tensor, "S D"]) -> Tensor | tuple[Tensor, Tensor]:
        parts = state.view(state.shape[0], self._parts, self.rnn.num_layers, self.rnn.hidden_size).permute(1, 2, 0, 3)
        h = parts[0].contiguous()
        return (h, parts[1].contiguous()) if self._parts == 2 else h


def _torch_core(
    cell: Callable[..., nn.RNN | nn.GRU | nn.LSTM],
    input_size: int,
    hidden_size: int,
    num_layers: int,
    dropout: float,
    **kwargs: str,
) -> Core:
    return TorchCore(cell(input_size, hidden_size, num_layers, dropout=dropout, **kwargs))


CORES: dict[str, Callable[..., Core]] = {
    "none": lambda input_size, hidden_size, num_layers, dropout: NoMemory(input_size),
    "rnn_tanh": partial(_torch_core, nn.RNN, nonlinearity="tanh"),
    "rnn_relu": partial(_torch_core, nn.RNN, nonlinearity="relu"),
    "gru": partial(_torch_core, nn.GRU),
    "lstm": partial(_torch_core, nn.LSTM),
}
"""By ``core.kind``: ``(input_size, hidden_size, num_layers, dropout) -> Core``. Dropout acts between layers."""
