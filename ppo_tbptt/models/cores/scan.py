"""Cores with a linear recurrence, ``h_t = a_t h_{t-1} + b_t`` elementwise: minGRU and LRU, unrolled by one scan.

Neither ``a`` nor ``b`` depends on the state, so every matrix product of a layer is computed for all steps at once, and
those of the first layer once for each distinct input (:meth:`~ppo_tbptt.models.cores.Core.project_input`). What is left
of each step is a multiplication and addition for all sequences at once.

Doubling needs log2 L passes over all steps in place of L small ones. On a CPU that took 2 to 60 times as long for 13 to
200 sequences of 32 to 512 steps, and a third of the time for 4 of 512. With sequences of 32, 128 and 512 an update of a
minGRU of 128 units is 3.5, 4.5 and 6.8 times as fast as a GRU's, an LRU's 1.0, 1.3 and 2.0 times (6,656 steps, every
input 50 times, bfloat16, one thread).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models.cores.core import Core
from ppo_tbptt.models.cores.recurrence import Packing


def scan(
    a: Float[Tensor, "*M H"],
    b: Float[Tensor, "M H"],
    state: Float[Tensor, "S H"],
    sequences_per_step: Packing,
    rotation: Float[Tensor, "H"] | None = None,
    *,
    padded: bool = False,
) -> Float[Tensor, "M H"]:
    """Compute ``h_t = a_t h_{t-1} + b_t`` over packed sequences (see :class:`~ppo_tbptt.types.Minibatch`).

    Nothing is divided and no logarithm taken, so all may be zero or negative. Gradients go to all tensors.

    Args:
        a: factor of each step, or one for all steps, ``[H]``.
        b: what each step adds.
        state: before the first step of each sequence.
        sequences_per_step: the packing.
        rotation: adds ``rotation * swap(h_{t-1})``, where ``swap`` exchanges the halves of H. A factor ``u + iv`` of
            complex numbers, whose real parts are the first half and whose imaginary parts are the second, is
            ``a = (u, u)`` and ``rotation = (-v, v)``.
        padded: compute over the rectangle [L, S] around the steps, and leave out what is not one of them.

    Returns:
        The state after every step, packed.
    """
    sizes = sequences_per_step
    if len(sizes) == 1:
        h = torch.addcmul(b, a, state)
        return h if rotation is None else torch.addcmul(h, rotation, _swap(state))
    if padded and sizes[-1] < sizes[0]:
        mask = torch.arange(sizes[0]) < torch.tensor(sizes)[:, None]
        valid = mask.flatten().nonzero().squeeze(1).to(b.device)
        a, b = (x if x.dim() == 1 else x.new_zeros(mask.numel(), x.shape[1]).index_copy(0, valid, x) for x in (a, b))
        return scan(a, b, state, [sizes[0]] * len(sizes), rotation).index_select(0, valid)
    all_states: Any = _Scan.apply(sizes, a, b, state, rotation)
    return all_states


class _Scan(torch.autograd.Function):
    """The gradient by b is a scan in reverse: ``g_t = gradient by h_t + a_{t+1} g_{t+1}``, swapped after rotation."""

    @staticmethod
    def forward(ctx: Any, sizes: list[int], a: Tensor, b: Tensor, state: Tensor, rotation: Tensor | None) -> Tensor:
        h, before = torch.empty_like(b), state
        for h_t, a_t, b_t in zip(h.split(sizes), _by_step(a, sizes), b.split(sizes), strict=True):
            before = before[: len(h_t)]
            torch.addcmul(b_t, a_t, before, out=h_t)
            if rotation is not None:
                h_t.addcmul_(rotation, _swap(before))
            before = h_t
        ctx.sizes = sizes
        ctx.save_for_backward(a, state, rotation, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        a, state, rotation, h = ctx.saved_tensors
        sizes, first = ctx.sizes, ctx.sizes[0]
        g = torch.cat((state.new_zeros(state.shape), gradients[0]))  # by the states before the first steps, too
        by_step = g.split([first, *sizes])
        for earlier, a_t, g_t in zip(by_step[-2::-1], _by_step(a, sizes)[::-1], by_step[:0:-1], strict=True):
            earlier[: len(g_t)].addcmul_(a_t, g_t)
            if rotation is not None:
                earlier[: len(g_t)].add_(_swap(rotation * g_t))
        pairs = zip(h.split(sizes), sizes[1:], strict=False)
        before, by_b = torch.cat([state, *(h_t[:going_on] for h_t, going_on in pairs)]), g[first:]
        by_a = by_b * before
        by_rotation = None if rotation is None else (by_b * _swap(before)).sum(0)
        return None, by_a.sum(0) if a.dim() == 1 else by_a, by_b, g[:first], by_rotation


def _swap(x: Float[Tensor, "n H"]) -> Float[Tensor, "n H"]:
    return torch.cat(x.chunk(2, 1)[::-1], 1)


def _by_step(a: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [a] * len(sizes) if a.dim() == 1 else a.split(sizes)


class Layer(nn.Module):
    """One layer of a :class:`ScanCore`, constructed as ``(input_size, hidden_size)``."""

    width: ClassVar[int]
    """Real numbers in the state of each of its H units."""
    weight: nn.Parameter
    """``[P, F]``: all that the layer does to its input without memory."""
    bias: nn.Parameter | None

    def project(self, x: Float[Tensor, "*U _"], columns: slice = slice(None)) -> Float[Tensor, "*U P"]:
        """Multiply by these columns of the weight; the first ones bring the bias with them."""
        return F.linear(x, self.weight[:, columns], None if columns.start else self.bias)

    def forward(
        self, p: Float[Tensor, "M P"], state: Float[Tensor, "S W"], sequences_per_step: Packing, padded: bool
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "M W"]]:
        """Unroll packed sequences of projected inputs; return the outputs, and the state after every step."""
        raise NotImplementedError

    def gates(self, p: Float[Tensor, "M P"]) -> list[Float[Tensor, "M 1 H"]]:
        """Return the layer's gates, if it has any."""
        return []

    def undecayed(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay does not apply to."""
        return []


class MinGRULayer(Layer):
    """``z = sigmoid(W_z x)``, ``h~ = W_h x``, ``h' = (1 - z) h + z h~`` (section 3.1.3)."""

    width = 1

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.bias = nn.Parameter(torch.zeros(2 * hidden_size))
        nn.init.orthogonal_(self.weight, 2**0.5)

    def forward(self, p: Tensor, state: Tensor, sequences_per_step: Packing, padded: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Layer.forward`."""
        z, candidate = p.chunk(2, 1)
        h = scan((-z).sigmoid(), z.sigmoid() * candidate, state, sequences_per_step, padded=padded)
        return h, h

    def gates(self, p: Tensor) -> list[Tensor]:
        """See :meth:`Layer.gates`."""
        return [p.chunk(2, 1)[0].sigmoid()[:, None]]


class LRULayer(Layer):
    """``h' = lambda h + exp(gamma) B x`` with complex h; the output is a gated linear unit of ``Re(C h) + D x``.

    ``lambda = exp(-exp(nu) + i exp(theta))`` (section 3.3 and 3.4), whose absolute value is below 1. All of that is
    linear, hence the gated linear unit ``(W u + w) sigmoid(V u + v)`` that follows the recurrence in the paper's block
    (figure 1). That block's normalisation and shortcut are ``core.norm`` and ``core.residual``, around all layers.

    In the state and the rows of B all real parts come first. Of C the imaginary part is negated, so that ``Re(C h)`` is
    a real product.
    """

    width = 2
    RADIUS = (0.9, 0.999)
    """Initial |lambda|, uniform on the ring between them: states that last 10 to 1,000 steps."""
    PHASE = math.pi / 10
    """Largest initial angle of lambda; the paper restricts it in this way where sequences are long (section 3.4)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        squared = torch.empty(hidden_size).uniform_(self.RADIUS[0] ** 2, self.RADIUS[1] ** 2)
        self.nu = nn.Parameter((-0.5 * squared.log()).log())
        self.theta = nn.Parameter((self.PHASE * (1 - torch.rand(hidden_size))).log())
        self.gamma = nn.Parameter(0.5 * (1 - squared).log())
        """Logarithm of the factor that keeps the state's size, whatever lambda: at first sqrt(1 - |lambda|^2)."""
        b, d = torch.randn(2 * hidden_size, input_size) / 2**0.5, torch.randn(hidden_size, input_size)
        self.weight = nn.Parameter(torch.cat((b, d)) / input_size**0.5)
        self.bias = None
        self.c = nn.Parameter(torch.randn(hidden_size, 2 * hidden_size) / hidden_size**0.5)
        self.out = nn.Linear(hidden_size, 2 * hidden_size)
        nn.init.orthogonal_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def undecayed(self) -> list[nn.Parameter]:
        """See :meth:`Layer.undecayed`; as in the paper (section 2.2): at 0 |lambda| is 0.37, which forgets at once."""
        return [self.nu, self.theta, self.gamma]

    def forward(self, p: Tensor, state: Tensor, sequences_per_step: Packing, padded: bool) -> tuple[Tensor, Tensor]:
        """See :meth:`Layer.forward`."""
        size = 2 * len(self.nu)
        radius, angle, gamma = (-self.nu.exp()).exp(), self.theta.exp(), self.gamma.exp()
        real, imaginary = radius * angle.cos(), radius * angle.sin()
        a, rotation = torch.cat((real, real)), torch.cat((-imaginary, imaginary))
        h = scan(a, p[:, :size] * torch.cat((gamma, gamma)), state, sequences_per_step, rotation, padded=padded)
        return F.glu(self.out(F.linear(h, self.c) + p[:, size:]), 1), h


class ScanCore(Core):
    """A stack of layers with linear recurrences. The state is laid out as ``[layer, part, hidden]``."""

    layer_class: ClassVar[type[Layer]]

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.layers = nn.ModuleList(self.layer_class(n, size) for n in [input_size] + [size] * (config.num_layers - 1))
        self.dropout = config.dropout
        self.state_size = config.num_layers * size * self.layer_class.width
        self.output_size = size
        self.padded = config.execution == "padded"
        if config.initial_state == "learnt":
            self.learnt_state = nn.Parameter(torch.zeros(self.state_size))

    def undecayed(self) -> list[nn.Parameter]:
        """See :meth:`Core.undecayed`."""
        return super().undecayed() + [p for layer in self._layers() for p in layer.undecayed()]

    def project_input(self, x: Float[Tensor, "*U _"], columns: slice) -> Float[Tensor, "*U _"]:
        """See :meth:`Core.project_input`."""
        return self._layers()[0].project(x, columns)

    def join_inputs(self, parts: Sequence[Float[Tensor, "*M _"]]) -> Float[Tensor, "*M P"]:
        """Add the projections."""
        return sum(parts[1:], parts[0])

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        y, states = self._recur(x.flatten(0, 1), state, [x.shape[1]] * len(x))
        return y.unflatten(0, x.shape[:2]), torch.cat([h.unflatten(0, x.shape[:2])[-1] for h in states], 1)

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        y, states = self._recur(x, state, sequences_per_step.tolist())
        sequences = torch.arange(len(state))
        lengths = (sequences_per_step[:, None] > sequences).sum(0)
        last = (sequences_per_step.cumsum(0) - sequences_per_step)[lengths - 1] + sequences
        last = last.to(x.device)
        return y, torch.cat([h.index_select(0, last) for h in states], 1)

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """See :meth:`Core.gates`."""
        inputs: list[Tensor] = []
        self._recur(x, state, [len(x)], inputs)
        return [gate for layer, p in zip(self._layers(), inputs, strict=True) for gate in layer.gates(p)]

    def _recur(
        self, p: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sizes: Packing, inputs: list[Tensor] | None = None
    ) -> tuple[Float[Tensor, "M H"], list[Float[Tensor, "M W"]]]:
        """Run all layers; return the output, and each layer's state after every step."""
        y, states = p, []
        for number, (layer, before) in enumerate(zip(self._layers(), state.chunk(len(self.layers), 1), strict=True)):
            p = layer.project(F.dropout(y, self.dropout, self.training)) if number else p
            p = p.to(state.dtype)  # autocast's is too coarse for a state
            if inputs is not None:
                inputs.append(p)
            y, h = layer(p, before, sizes, self.padded)
            states.append(h)
        return y, states

    def _layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]


class MinGRU(ScanCore):
    """The minimal GRU (Feng et al. 2024, https://arxiv.org/abs/2410.01201).

    The candidate is linear. The paper's function g makes it positive for its scan of logarithms alone.
    """

    layer_class = MinGRULayer


class LRU(ScanCore):
    """The linear recurrent unit (Orvieto et al. 2023, https://arxiv.org/abs/2303.06349)."""

    layer_class = LRULayer
