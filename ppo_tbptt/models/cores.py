"""Recurrent cores. Their state is one flat vector per sequence, packed and unpacked here and nowhere else.

A new cell is one class with the interface of :class:`Core` and one entry in ``CORES``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Core(nn.Module, ABC):
    """What turns features into features with memory.

    ``state_size`` (D) is the width of the state, 0 for no memory; ``output_size`` (H) the width of the output.
    """

    state_size: int
    output_size: int

    def initial_state(self, batch: int) -> Float[Tensor, "B D"]:
        """The state at the start of an episode."""
        return torch.zeros(batch, self.state_size, device=next(self.parameters()).device)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "L B F"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """Unroll over L steps from ``state``; the state returned is the one after the last step."""
        raise NotImplementedError


class NoMemory(Core):
    """The identity, with a state of width 0: PPO without recurrence."""

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


class TorchCore(Core):
    """``torch.nn``'s RNN, GRU or LSTM. The state is laid out as ``[part, layer, hidden]`` (parts: h, and c of LSTM)."""

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
        batch = x.shape[1]
        parts = state.view(batch, self._parts, self.rnn.num_layers, self.rnn.hidden_size).permute(1, 2, 0, 3)
        if self._parts == 2:
            y, (h, c) = self.rnn(x, (parts[0].contiguous(), parts[1].contiguous()))
            after = torch.stack((h, c))
        else:
            y, h = self.rnn(x, parts[0].contiguous())
            after = h[None]
        return y, after.permute(2, 0, 1, 3).reshape(batch, self.state_size)


def _torch_core(cell: Callable[..., nn.RNN | nn.GRU | nn.LSTM], **kwargs: str) -> Callable[..., Core]:
    def build(input_size: int, hidden_size: int, num_layers: int, dropout: float) -> Core:
        return TorchCore(cell(input_size, hidden_size, num_layers, dropout=dropout, **kwargs))

    return build


CORES: dict[str, Callable[..., Core]] = {
    "none": lambda input_size, hidden_size, num_layers, dropout: NoMemory(input_size),
    "rnn_tanh": _torch_core(nn.RNN, nonlinearity="tanh"),
    "rnn_relu": _torch_core(nn.RNN, nonlinearity="relu"),
    "gru": _torch_core(nn.GRU),
    "lstm": _torch_core(nn.LSTM),
}
"""By ``core.kind``: ``(input_size, hidden_size, num_layers, dropout) -> Core``. Dropout acts between layers."""
