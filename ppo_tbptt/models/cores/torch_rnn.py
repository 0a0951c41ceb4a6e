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

    On a GPU the module itself runs, by cuDNN. Elsewhere, and for cells that cuDNN does not know, :meth:`project_input`
    projects the inputs, and :mod:`ppo_tbptt.models.cores.recurrence` does the rest.
    """

    rnn_class: ClassVar[type[nn.RNN] | type[nn.GRU] | type[nn.LSTM]]
    rnn_options: ClassVar[Mapping[str, str]] = {}
    cell: ClassVar[type[recurrence.Cell]]
    on_cudnn: ClassVar[bool] = True

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
        self._keep_memory_at_first(config)
        self._traces: list[recurrence.Trace] | None = None
        self.padded = config.execution == "padded"
        if config.initial_state == "learnt":
            self.learnt_state = nn.Parameter(torch.zeros(self.state_size))

    @torch.no_grad()
    def _keep_memory_at_first(self, config: CoreConfig) -> None:
        """Initialise the bias of the gate that keeps memory, as the config says.

        That is the second gate in both: an LSTM's f (of i, f, g, o), a GRU's z (of r, z, n), which keeps where it is 1.

        forget_bias: it is this number (Jozefowicz et al. 2015).
        chrono_steps: it is log(u) with u uniform from 1 to T_max - 1, and an LSTM's input gate has -log(u) (Tallec and
            Ollivier 2018, https://arxiv.org/abs/1804.11188). They write 1 - z for a GRU's z, hence its other sign here.
        """
        if not config.forget_bias and config.chrono_steps is None:
            return
        for layer in range(self.rnn.num_layers):
            gates = self.rnn.get_parameter(f"bias_hh_l{layer}").view(-1, self.rnn.hidden_size)
            if config.chrono_steps is None:
                gates[1] = config.forget_bias
                continue
            gates[1].uniform_(1, config.chrono_steps - 1).log_()
            if isinstance(self.rnn, nn.LSTM):
                gates[0] = -gates[1]

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
        if self._is_cudnns(x):
            return x
        weight, _, bias, _ = self._weights(0)
        return F.linear(x, weight[:, columns], None if columns.start else bias)

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """Add the projections, which are concatenated features on a GPU."""
        return super().join_inputs(parts) if self._is_cudnns(parts[0]) else sum(parts[1:], parts[0])

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        if self._is_cudnns(x):
            y, parts = self._cudnn(x, state)
            return y, self._pack(parts)
        y, parts = self._recur(x.flatten(0, 1), state, [x.shape[1]] * len(x))
        return y.view(*x.shape[:2], -1), self._pack(parts)

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        if not self._is_cudnns(x) or self._traces is not None:
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
            if layer or self._is_cudnns(x):
                p = self._project(layer, p)
            weight, bias, *norms = self._recurrent(layer)
            q = F.linear(before[0][layer], weight, bias)
            (p, *_), kept = self.cell.step(p, q, [part[layer] for part in before], *norms)
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
            if layer:
                p = self._project(layer, F.dropout(y, self.rnn.dropout, self.training)).to(state.dtype)
            elif self._is_cudnns(p):  # where features come as they are
                p = self._project(layer, p).to(state.dtype)
            y, *c = self._run(layer, p, [part[layer] for part in before], sequences_per_step)
            for part, x in zip(after, (y, *c), strict=True):
                part.append(x if last is None else x.index_select(0, last.to(x.device)))
        return y, [torch.stack(layers) for layers in after]

    def _run(self, layer: int, p: Tensor, state: recurrence.State, sizes: recurrence.Packing) -> recurrence.State:
        """Run one layer over packed steps; if ``padded``, over the rectangle [L, S] around them."""
        weight, bias, *norms = self._recurrent(layer)
        trace = None
        if self._traces is not None:
            trace = recurrence.Trace(self.cell, weight, bias, norms, sizes[0])
            self._traces.append(trace)
        if not self.padded or len(sizes) == 1:
            return recurrence.run(self.cell, p, state, weight, bias, sizes, trace, norms)
        mask = torch.arange(sizes[0]) < torch.tensor(sizes)[:, None]
        valid = mask.flatten().nonzero().squeeze(1).to(p.device)
        # Inputs that shut every unit: of a sequence that has ended, ReLU's state could grow without bounds.
        rectangle = p.new_full((mask.numel(), p.shape[1]), -1e4).index_copy(0, valid, p)
        after = recurrence.run(self.cell, rectangle, state, weight, bias, [sizes[0]] * len(sizes), trace, norms)
        return [x.index_select(0, valid) for x in after]

    def _weights(self, layer: int) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [self.rnn.get_parameter(f"{name}_l{layer}") for name in names]

    def _project(self, layer: int, x: Float[Tensor, "M _"]) -> Float[Tensor, "M GH"]:
        """Compute what the whole of a layer's input adds to its gates."""
        weight, _, bias, _ = self._weights(layer)
        return F.linear(x, weight, bias)

    def _recurrent(self, layer: int) -> list[Any]:
        """Return ``weight``, ``bias``, and the ``norms`` of a layer for :func:`.recurrence.run`."""
        _, weight, _, bias = self._weights(layer)
        return [weight, bias]

    def _is_cudnns(self, x: Tensor) -> bool:
        """Whether cuDNN is given ``x``, or was to be, as it projects inputs itself."""
        return x.is_cuda and self.on_cudnn

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


class IRNN(ReluRNN):
    """A ReLU network that begins as the identity (Le et al. 2015, https://arxiv.org/abs/1504.00941, section 4).

    Its recurrent weights are the identity at first, its biases 0, and all input weights Gaussian with deviation 0.001.
    """

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__(input_size, config)
        for layer in range(self.rnn.num_layers):
            w_ih, w_hh, _, _ = self._weights(layer)
            nn.init.normal_(w_ih, 0, 0.001)
            nn.init.eye_(w_hh)


class GRU(TorchCore):
    """The gated recurrent unit (Cho et al. 2014, https://arxiv.org/abs/1406.1078)."""

    rnn_class, cell = nn.GRU, recurrence.GRU


class LSTM(TorchCore):
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate."""

    rnn_class, cell = nn.LSTM, recurrence.LSTM


class LayerNormed(TorchCore):
    """A cell whose gates see normalised sums (Ba et al. 2016, https://arxiv.org/abs/1607.06450); not by cuDNN.

    What the input adds to them, ``W_ih x``, and what the state adds, ``W_hh h``, are normalised each for itself.
    ``b_ih`` and ``b_hh`` are the biases after that; ``norms`` has the gains, and both for an LSTM's cell state.
    """

    on_cudnn = False

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__(input_size, config)
        self.norms = nn.ParameterDict()
        for layer in range(config.num_layers):
            _, _, b_ih, b_hh = self._weights(layer)
            self.norms[f"gain_ih_l{layer}"] = torch.ones_like(b_ih)
            self.norms[f"gain_hh_l{layer}"] = torch.ones_like(b_hh)
            if isinstance(self.rnn, nn.LSTM):
                self.norms[f"gain_c_l{layer}"] = torch.ones(config.hidden_size)
                self.norms[f"bias_c_l{layer}"] = torch.zeros(config.hidden_size)

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """Multiply by these columns of the first layer's input weights; the sum of all is normalised, not this part."""
        return F.linear(x, self._weights(0)[0][:, columns])

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """Add the projections, and normalise the sum."""
        return self._normalize(0, sum(parts[1:], parts[0]))

    def _project(self, layer: int, x: Float[Tensor, "M _"]) -> Float[Tensor, "M GH"]:
        return self._normalize(layer, F.linear(x, self._weights(layer)[0]))

    def _normalize(self, layer: int, x: Float[Tensor, "M GH"]) -> Float[Tensor, "M GH"]:
        gain, bias = self.norms[f"gain_ih_l{layer}"], self._weights(layer)[2]
        return recurrence.normalize(x.to(gain.dtype), gain, bias, self.cell.groups)

    def _recurrent(self, layer: int) -> list[Any]:
        _, weight, _, bias = self._weights(layer)
        of_c = [f"gain_c_l{layer}", f"bias_c_l{layer}"] if isinstance(self.rnn, nn.LSTM) else []
        return [weight, None, self.norms[f"gain_hh_l{layer}"], bias, *(self.norms[name] for name in of_c)]


class LayerNormGRU(LayerNormed, GRU):
    """The GRU, layer-normalised as in the supplement: r and z together, n for itself."""

    cell = recurrence.LayerNormGRU


class LayerNormLSTM(LayerNormed, LSTM):
    """The LSTM, layer-normalised by equations 20 to 22: all gates together, and the cell state before its tanh."""

    cell = recurrence.LayerNormLSTM
