"""The cores of ``torch.nn``: RNN, GRU and LSTM."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models.cores import recurrence
from ppo_tbptt.models.cores.core import Core


class TorchCore(Core):
    """The weights of ``torch.nn``'s RNN, GRU or LSTM. The state is laid out as ``[part, layer, hidden]`` (parts: h, c).

    On a GPU the module itself runs, by cuDNN. Elsewhere inputs are projected by :meth:`project_input`, and
    :mod:`ppo_tbptt.models.cores.recurrence` does the rest.
    """

    rnn_class: ClassVar[type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]]
    rnn_options: ClassVar[Mapping[str, str]] = {}
    cell: ClassVar[type[recurrence.Cell]]

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__()
        self.rnn = rnn = self.rnn_class(
            input_size, config.hidden_size, config.num_layers, dropout=config.dropout, **self.rnn_options
        )
        self._parts = 2 if isinstance(rnn, nn.LSTM) else 1
        self.state_size = self._parts * rnn.num_layers * rnn.hidden_size
        self.output_size = rnn.hidden_size
        for name, parameter in rnn.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, 2**0.5)
        self._traces: list[recurrence.Trace] | None = None
        self.padded = config.execution == "padded"
        if config.initial_state == "learnt":
            self.learnt_state = nn.Parameter(torch.zeros(self.state_size))

    @contextmanager
    def traced(self) -> Iterator[list[recurrence.Trace]]:
        """List every layer of each :meth:`unroll` inside of the context, for what its backward pass leaves behind.

        On a GPU too :mod:`ppo_tbptt.models.cores.recurrence` computes them, and not cuDNN.
        """
        self._traces = []
        try:
            yield self._traces
        finally:
            self._traces = None

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """Multiply by these columns of the first layer's input weights; the first ones bring the bias with them."""
        if x.is_cuda:
            return x
        weight, _, bias, _ = self._weights(0)
        return F.linear(x, weight[:, columns], None if columns.start else bias)

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """Add the projections, which are concatenated features on a GPU."""
        return super().join_inputs(parts) if parts[0].is_cuda else sum(parts[1:], parts[0])

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        if x.is_cuda:
            y, parts = self._cudnn(x, state)
            return y, self._pack(parts)
        y, parts = self._recur(x.flatten(0, 1), state, [x.shape[1]] * len(x))
        return y.view(*x.shape[:2], -1), self._pack(parts)

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        if not x.is_cuda or self._traces is not None:
            y, parts = self._recur(x, state, sequences_per_step.tolist())
            return y, self._pack(parts)
        if self.padded or len(x) == len(sequences_per_step) * len(state):
            return super().unroll(x, state, sequences_per_step)  # a rectangle: plain tensors are faster
        y, parts = self._cudnn(PackedSequence(x, sequences_per_step), state)
        return y.data, self._pack(parts)

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """See :meth:`Core.gates`."""
        before, p, gates = self._unpack(state), x, []
        for layer in range(self.rnn.num_layers):
            w_ih, w_hh, b_ih, b_hh = self._weights(layer)
            if layer or x.is_cuda:
                p = F.linear(p, w_ih, b_ih)
            q = F.linear(before[0][layer], w_hh, b_hh)
            (p, *_), kept = self.cell.step(p, q, [part[layer] for part in before])
            gates.append(self.cell.gates(kept))
        return gates

    def _recur(
        self, p: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: recurrence.Packing
    ) -> tuple[Float[Tensor, "M H"], list[Tensor]]:
        """Run all layers; also return each part ``[layer, S, H]`` of the state after each sequence's last step."""
        before = self._unpack(state)
        y, last = p, _last_steps(sequences_per_step)
        after: list[list[Tensor]] = [[] for _ in before]
        for layer in range(self.rnn.num_layers):
            w_ih, w_hh, b_ih, b_hh = self._weights(layer)
            if layer:
                p = F.linear(F.dropout(y, self.rnn.dropout, self.training), w_ih, b_ih).to(state.dtype)
            elif p.is_cuda:  # where features come as they are
                p = F.linear(p, w_ih, b_ih).to(state.dtype)
            y, *c = self._run(p, [part[layer] for part in before], w_hh, b_hh, sequences_per_step)
            for part, x in zip(after, (y, *c), strict=True):
                part.append(x if last is None else x.index_select(0, last.to(x.device)))
        return y, [torch.stack(layers) for layers in after]

    def _run(
        self, p: Tensor, state: recurrence.State, weight: Tensor, bias: Tensor, sizes: recurrence.Packing
    ) -> recurrence.State:
        """Run one layer over packed steps; if ``padded``, over the rectangle [L, S] around them."""
        trace = None
        if self._traces is not None:
            trace = recurrence.Trace(self.cell, weight, bias, sizes[0])
            self._traces.append(trace)
        if not self.padded or len(sizes) == 1:
            return recurrence.run(self.cell, p, state, weight, bias, sizes, trace)
        mask = torch.arange(sizes[0]) < torch.tensor(sizes)[:, None]
        valid = mask.flatten().nonzero().squeeze(1).to(p.device)
        # Inputs that shut every unit: of a sequence that has ended, ReLU's state could grow without bounds.
        rectangle = p.new_full((mask.numel(), p.shape[1]), -1e4).index_copy(0, valid, p)
        after = recurrence.run(self.cell, rectangle, state, weight, bias, [sizes[0]] * len(sizes), trace)
        return [x.index_select(0, valid) for x in after]

    def _weights(self, layer: int) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [self.rnn.get_parameter(f"{name}_l{layer}") for name in names]

    def _cudnn(self, x: Any, state: Float[Tensor, "S D"]) -> Any:
        """Call the module itself, always in the weights' float32.

        It computes on TF32's tensor cores where the agent's precision is bfloat16 (see
        :func:`~ppo_tbptt.runtime.device.tf32`). Inside of autocast cuDNN would compute in float16, whatever type
        autocast asks for (PyTorch's ``_cudnn_rnn_cast_reflatten``, up to 2.11 at least), where gradients underflow
        without loss scaling.
        """
        h, *c = self._unpack(state)
        with torch.autocast("cuda", enabled=False):
            y, after = self.rnn(x.to(self._weights(0)[0].dtype), (h, *c) if c else h)
        return y, list(after) if c else [after]

    def _unpack(self, state: Float[Tensor, "S D"]) -> list[Tensor]:
        parts = state.view(state.shape[0], self._parts, self.rnn.num_layers, self.rnn.hidden_size).permute(1, 2, 0, 3)
        return [part.contiguous() for part in parts]

    def _pack(self, parts: list[Tensor]) -> Float[Tensor, "S D"]:
        return torch.stack(parts).permute(2, 0, 1, 3).reshape(-1, self.state_size)


def _last_steps(sequences_per_step: recurrence.Packing) -> Int[Tensor, "S"] | None:
    """Return the position of each packed sequence's last step; None where there is but one step."""
    if len(sequences_per_step) == 1:
        return None
    end, last = 0, [0] * sequences_per_step[0]
    for count in sequences_per_step:
        last[:count] = range(end, end + count)
        end += count
    return torch.tensor(last)


class TanhRNN(TorchCore):
    """Elman's network with tanh."""

    rnn_class, cell = nn.RNN, recurrence.TanhRNN
    rnn_options: ClassVar = {"nonlinearity": "tanh"}


class ReluRNN(TorchCore):
    """Elman's network with ReLU."""

    rnn_class, cell = nn.RNN, recurrence.ReluRNN
    rnn_options: ClassVar = {"nonlinearity": "relu"}


class GRU(TorchCore):
    """The gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078)."""

    rnn_class, cell = nn.GRU, recurrence.GRU


class LSTM(TorchCore):
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate."""

    rnn_class, cell = nn.LSTM, recurrence.LSTM
