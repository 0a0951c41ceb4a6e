"""Recurrent layers over packed sequences whose inputs are projected already: the equations of ``torch.nn``'s cells.

``torch.nn.GRU`` and its kin multiply the input of every step by the input weights. Where inputs repeat, that is done
once for each distinct one (:meth:`~ppo_tbptt.models.cores.Core.project_input`). A layer is left with its recurrence:

    p_t = W_ih x_t + b_ih  (given)      q_t = W_hh h_{t-1} + b_hh      state_t = step(p_t, q_t, state_{t-1})

The backward pass needs one product with ``W_hh`` and a few multiplications per step, because all factors that do not
depend on later steps are computed at once; the gradient of ``W_hh`` is one large product at the end. That and keeping
the gates took the backward pass of a GRU of 128 through 6,924 steps from 28 to 20 ms (bfloat16, one thread).

Layer-normalised cells have no ``b_hh`` in q; their biases come after the normalisation, with its gains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward
layer_norm_backward = torch.ops.aten.native_layer_norm_backward

State = list[Tensor]
"""The hidden state, and the cell state of an LSTM, ``[n, H]`` each."""
Kept = Sequence[Tensor]
"""What a layer's backward pass needs of a step, ``[n, _]`` each."""
Packing = list[Any]
"""Number of sequences at each step; symbols while an agent is exported."""


@dataclass(slots=True)
class Trace:
    """What a layer's backward pass through S packed sequences of M steps leaves behind."""

    cell: "type[Cell]"
    weight: Float[Tensor, "GH H"]
    bias: Float[Tensor, "GH"] | None
    norms: Sequence[Float[Tensor, "_"]]
    num_sequences: int
    """S: so many steps are the first ones of their sequences."""
    steps: tuple[Float[Tensor, "M GH"], State, State] | None = None
    """p, the state before each step, and the gradient by the state after it: of all losses, those of later steps
    included. None before the backward pass."""

    @property
    def parameters(self) -> list[Tensor]:
        """All of the layer that acts between the state before a step and the state after it."""
        return [x for x in (self.weight, self.bias, *self.norms) if x is not None]


ROWS = 8
"""Products with ``W_hh`` are of so many rows or a multiple, where there are such; see :func:`.pad_rows`. With that an
update of cpu/mortar_mayhem_grid takes 0.66 s instead of 0.81."""


class Cell:
    """The equations of one kind of layer. An object holds what its backward pass through M packed steps needs.

    factor: derivative of q by the hidden state or, for an LSTM's first three gates, by the cell state, ``[M, G, H]``.
    norms: gains and biases of what is normalised within a step, in the order of the cell's own; none of most cells.
    groups: so many gates are normalised together; none of most cells.
    """

    factor: Tensor
    groups: ClassVar[tuple[int, ...]] = ()

    def __init__(self, before: State, kept: Kept, *norms: Tensor) -> None:
        """Compute the factors from the state before each step, and what :meth:`step` kept of it."""
        raise NotImplementedError

    @staticmethod
    def step(
        p: Float[Tensor, "n GH"], q: Float[Tensor, "n GH"], state: State, *norms: Float[Tensor, "_"]
    ) -> tuple[State, Kept]:
        """Return the state after one step of n sequences, and what the backward pass needs of it."""
        raise NotImplementedError

    @staticmethod
    def gates(kept: Kept) -> Float[Tensor, "M _ H"]:
        """Return what may saturate at 0 and 1: the sigmoid gates; of a cell without any its units, scaled to that."""
        raise NotImplementedError

    def back(self, rows: slice, after: State, dq: Float[Tensor, "n G H"], before: State) -> None:
        """Go back through the step ``rows`` from the loss by the state ``after`` it.

        Fills ``dq``, and adds to the loss by the state ``before`` what does not go through q.
        """
        torch.mul(after[0][:, None], self.factor[rows], out=dq)

    def input_gradient(self, dh: Float[Tensor, "M H"], dq: Float[Tensor, "M G H"]) -> None:
        """Turn the loss by q into that by p, in place; ``dh`` is that by the hidden states."""

    def norm_gradients(self) -> list[Tensor]:
        """Return the loss by each of ``norms``."""
        return []


class GRU(Cell):
    """``r, z = sigmoid(p + q)``, ``n = tanh(p + r q)``, ``h' = (1 - z) n + z h``."""

    def __init__(self, before: State, kept: Kept) -> None:
        rz, n, q_n = kept
        r, self.z = rz.chunk(2, 1)
        self.by_n = tanh_backward(1 - self.z, n)
        self.factor = n.new_empty(len(n), 3, n.shape[1])
        sigmoid_backward.grad_input(self.by_n * q_n, r, grad_input=self.factor[:, 0])
        sigmoid_backward.grad_input(before[0] - n, self.z, grad_input=self.factor[:, 1])
        torch.mul(self.by_n, r, out=self.factor[:, 2])

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *_: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        size = p.shape[1] // 3
        rz, q_n = (p[:, : 2 * size] + q[:, : 2 * size]).sigmoid(), q[:, 2 * size :]
        n = torch.addcmul(p[:, 2 * size :], rz[:, :size], q_n).tanh()
        return [torch.lerp(n, state[0], rz[:, size:])], (rz, n, q_n)

    @staticmethod
    def gates(kept: Kept) -> Tensor:
        """See :meth:`Cell.gates`."""
        return kept[0].unflatten(1, (2, -1))

    def back(self, rows: slice, after: State, dq: Tensor, before: State) -> None:
        """See :meth:`Cell.back`."""
        torch.mul(after[0][:, None], self.factor[rows], out=dq)
        before[0].addcmul_(after[0], self.z[rows])

    def input_gradient(self, dh: Tensor, dq: Tensor) -> None:
        """See :meth:`Cell.input_gradient`."""
        torch.mul(dh, self.by_n, out=dq[:, 2])


class LSTM(Cell):
    """``i, f, o = sigmoid(p + q)``, ``g = tanh(p + q)``, ``c' = f c + i g``, ``h' = o tanh(c')``."""

    def __init__(self, before: State, kept: Kept) -> None:
        i, self.f, g, o, tanh_c = kept
        self.c_by_h = tanh_backward(o, tanh_c)
        self.factor = i.new_empty(len(i), 4, i.shape[1])
        sigmoid_backward.grad_input(g, i, grad_input=self.factor[:, 0])
        sigmoid_backward.grad_input(before[1], self.f, grad_input=self.factor[:, 1])
        tanh_backward.grad_input(i, g, grad_input=self.factor[:, 2])
        sigmoid_backward.grad_input(tanh_c, o, grad_input=self.factor[:, 3])

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *_: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        i, f, g, o = (p + q).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(f * state[1], i, g)
        tanh_c = c.tanh()
        return [o * tanh_c, c], (i, f, g, o, tanh_c)

    @staticmethod
    def gates(kept: Kept) -> Tensor:
        """See :meth:`Cell.gates`."""
        return torch.stack([kept[number] for number in (0, 1, 3)], 1)

    def back(self, rows: slice, after: State, dq: Tensor, before: State) -> None:
        """See :meth:`Cell.back`."""
        dh, factor = after[0], self.factor[rows]
        dc = self.by_cell(rows, after)
        torch.mul(dc[:, None], factor[:, :3], out=dq[:, :3])
        torch.mul(dh, factor[:, 3], out=dq[:, 3])
        before[1].addcmul_(dc, self.f[rows])

    def by_cell(self, rows: slice, after: State) -> Tensor:
        """Return the loss by the cell state after the step ``rows``, with what goes through the hidden state."""
        return torch.addcmul(after[1], after[0], self.c_by_h[rows])


class TanhRNN(Cell):
    """``h' = tanh(p + q)``."""

    def __init__(self, before: State, kept: Kept) -> None:
        self.factor = (1 - kept[0] * kept[0])[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *_: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        h = (p + q).tanh()
        return [h], (h,)

    @staticmethod
    def gates(kept: Kept) -> Tensor:
        """See :meth:`Cell.gates`."""
        return (kept[0][:, None] + 1) / 2


class ReluRNN(Cell):
    """``h' = relu(p + q)``."""

    def __init__(self, before: State, kept: Kept) -> None:
        self.factor = (kept[0] > 0).to(kept[0].dtype)[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *_: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        h = (p + q).relu()
        return [h], (h,)

    @staticmethod
    def gates(kept: Kept) -> Tensor:
        """See :meth:`Cell.gates`; a unit is saturated where it is off."""
        return (kept[0] > 0).to(kept[0].dtype)[:, None] / 2


EPSILON = 1e-5
"""Added to the variance that something is divided by the root of."""


def normalize(
    x: Float[Tensor, "n GH"], gain: Float[Tensor, "GH"], bias: Float[Tensor, "GH"], groups: Sequence[int]
) -> Float[Tensor, "n GH"]:
    """Normalise each row of ``x`` in groups of so many gates (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""
    width = x.shape[1] // sum(groups)
    parts = zip(*(y.split([gates * width for gates in groups], -1) for y in (x, gain, bias)), strict=True)
    normal = [F.layer_norm(y, y.shape[1:], gain, bias, EPSILON) for y, gain, bias in parts]
    return normal[0] if len(normal) == 1 else torch.cat(normal, 1)


class _Norm:
    """A normalisation of M rows, differentiated a few rows at a time."""

    def __init__(self, x: Float[Tensor, "M W"], gain: Float[Tensor, "W"]) -> None:
        self.x, self.gain = x.contiguous(), gain
        _, *self.moments = torch.native_layer_norm(self.x, list(gain.shape), None, None, EPSILON)

    def back(self, rows: slice, by_y: Float[Tensor, "n W"]) -> Float[Tensor, "n W"]:
        """Turn the loss by the normalised ``rows`` into that by the rows as they were."""
        return self._backward(rows, by_y, [True, False, False])[0]

    def gradients(self, by_y: Float[Tensor, "M W"]) -> tuple[Float[Tensor, "W"], Float[Tensor, "W"]]:
        """Return the loss by gain and bias."""
        return self._backward(slice(None), by_y, [False, True, False])[1], by_y.sum(0)

    def _backward(self, rows: slice, by_y: Tensor, wanted: list[bool]) -> Any:
        mean, scale = (x[rows] for x in self.moments)
        return layer_norm_backward(by_y, self.x[rows], list(self.gain.shape), mean, scale, self.gain, None, wanted)


class LayerNormed(Cell):
    """A cell with ``norm(q)`` in the place of q; to be mixed into one, whose ``kept`` it appends q to.

    ``norms`` begins with the gains and the biases of all gates, ``[GH]`` each.
    """

    def __init__(self, before: State, kept: Kept, gain: Tensor, *_: Tensor) -> None:
        super().__init__(before, kept[:-1])
        self.by_norm = torch.empty_like(self.factor)
        q, gains = kept[-1].view(self.factor.shape), gain.view(self.factor.shape[1:])
        ends = list(accumulate(self.groups))
        self.gates_of = [slice(end - gates, end) for end, gates in zip(ends, self.groups, strict=True)]
        self.norm_of = [_Norm(q[:, gates].flatten(1), gains[gates].flatten()) for gates in self.gates_of]

    def back(self, rows: slice, after: State, dq: Tensor, before: State) -> None:
        """See :meth:`Cell.back`."""
        by_norm = self.by_norm[rows]
        super().back(rows, after, by_norm, before)
        for gates, norm in zip(self.gates_of, self.norm_of, strict=True):
            dq[:, gates] = norm.back(rows, by_norm[:, gates].flatten(1)).view_as(dq[:, gates])

    def input_gradient(self, dh: Tensor, dq: Tensor) -> None:
        """See :meth:`Cell.input_gradient`; the input is normalised already."""
        super().input_gradient(dh, dq.copy_(self.by_norm))

    def norm_gradients(self) -> list[Tensor]:
        """See :meth:`Cell.norm_gradients`."""
        pairs = zip(self.gates_of, self.norm_of, strict=True)
        gradients = [norm.gradients(self.by_norm[:, gates].flatten(1)) for gates, norm in pairs]
        return [torch.cat(x) for x in zip(*gradients, strict=True)]


class LayerNormGRU(LayerNormed, GRU):
    """``r, z = sigmoid(p + norm(q))``, ``n = tanh(p + r norm(q))``, ``h' = (1 - z) n + z h``.

    As in the supplement of Ba et al. 2016, r and z are normalised together, and n alone.
    """

    groups: ClassVar = (2, 1)

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *norms: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        gain, bias = norms
        after, kept = GRU.step(p, normalize(q, gain, bias, LayerNormGRU.groups), state)
        return after, (*kept, q)


class LayerNormLSTM(LayerNormed, LSTM):
    """``i, f, o = sigmoid(p + norm(q))``, ``g = tanh(p + norm(q))``, ``c' = f c + i g``, ``h' = o tanh(norm(c'))``.

    Equations 20 to 22 of Ba et al. 2016: all four gates are normalised together. ``norms`` ends with gain and bias for
    the cell state, ``[H]`` each.
    """

    groups: ClassVar = (4,)

    def __init__(self, before: State, kept: Kept, gain: Tensor, bias: Tensor, *norm_of_c: Tensor) -> None:
        *kept, c, q = kept
        super().__init__(before, [*kept, q], gain)
        self.c_norm, self.by_c_norm = _Norm(c, norm_of_c[0]), torch.empty_like(c)

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State, *norms: Tensor) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        gain, bias, gain_c, bias_c = norms
        i, f, g, o = (p + normalize(q, gain, bias, LayerNormLSTM.groups)).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = torch.addcmul(f * state[1], i, g)
        tanh_c = normalize(c, gain_c, bias_c, (1,)).tanh()
        return [o * tanh_c, c], (i, f, g, o, tanh_c, c, q)

    def by_cell(self, rows: slice, after: State) -> Tensor:
        """See :meth:`LSTM.by_cell`."""
        by_norm = torch.mul(after[0], self.c_by_h[rows], out=self.by_c_norm[rows])
        return after[1] + self.c_norm.back(rows, by_norm)

    def norm_gradients(self) -> list[Tensor]:
        """See :meth:`Cell.norm_gradients`."""
        return [*super().norm_gradients(), *self.c_norm.gradients(self.by_c_norm)]


def run(
    cell: type[Cell],
    p: Float[Tensor, "M GH"],
    state: State,
    weight: Float[Tensor, "GH H"],
    bias: Float[Tensor, "GH"] | None,
    sequences_per_step: Packing,
    trace: Trace | None = None,
    norms: Sequence[Float[Tensor, "_"]] = (),
) -> State:
    """Run a layer over packed sequences (see :class:`~ppo_tbptt.types.Minibatch`); gradients go to all tensors.

    Products with ``weight`` are in autocast's type, all else is in that of ``p``.

    Args:
        cell: the equations.
        p: projected inputs, packed.
        state: before the first step of each sequence.
        weight: ``W_hh``.
        bias: ``b_hh``, if q has one.
        sequences_per_step: the packing.
        trace: filled by the backward pass.
        norms: see :class:`Cell`.

    Returns:
        The state after every step, packed.
    """
    kind = p.device.type
    dtype = torch.get_autocast_dtype(kind) if kind == "cpu" and torch.is_autocast_enabled(kind) else weight.dtype
    if len(sequences_per_step) == 1 and not torch.is_grad_enabled():
        q = _product(state[0].to(dtype), weight.to(dtype).t(), None if bias is None else bias.to(dtype))
        return cell.step(p, q.to(p.dtype), state, *norms)[0]
    count = len(norms)
    return list(_Recurrence.apply(cell, sequences_per_step, dtype, trace, count, p, weight, bias, *norms, *state))


def _product(h: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(h, transposed) if bias is None else torch.addmm(bias, h, transposed)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        cell: type[Cell],
        sizes: Packing,
        dtype: torch.dtype,
        trace: Trace | None,
        num_norms: int,
        p: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Any:
        norms, state = tensors[:num_norms], list(tensors[num_norms:])
        transposed, bias = weight.to(dtype).t(), None if bias is None else bias.to(dtype)
        steps: list[tuple[Tensor, ...]] = []
        begin, rows = 0, len(state[0])
        for size in sizes:
            # Of sequences that have ended a few go on, and are left out of the result: new shapes cost more.
            rows = min(rows, size + -size % ROWS, len(p) - begin)
            before = [x[:rows] for x in state]
            q = _product(before[0].to(dtype), transposed, bias).to(p.dtype)
            state, kept = cell.step(p[begin : begin + rows], q, before, *norms)
            steps.append(tuple(x[:size] for x in (*state, *before, *kept)))
            begin += size
        packed = [torch.cat(x) for x in zip(*steps, strict=True)]
        ctx.cell, ctx.sizes, ctx.dtype, ctx.trace = cell, sizes, dtype, trace
        ctx.num_norms, ctx.has_bias = num_norms, bias is not None
        ctx.save_for_backward(weight, *norms, *([] if trace is None else [p]), *packed[len(state) :])
        return tuple(packed[: len(state)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, *tensors = ctx.saved_tensors
        trace: Trace | None = ctx.trace
        norms, tensors = tensors[: ctx.num_norms], tensors[ctx.num_norms :]
        p = tensors.pop(0) if trace is not None else None
        before, kept = tensors[: len(gradients)], tensors[len(gradients) :]
        cell, weight_ = ctx.cell(before, kept, *norms), weight.to(ctx.dtype)
        dq = torch.empty_like(cell.factor)
        dq_ = dq if ctx.dtype == dq.dtype else torch.empty_like(dq, dtype=ctx.dtype)
        first = ctx.sizes[0]
        by_state = [torch.cat((x.new_zeros(first, x.shape[1]), x)) for x in gradients]  # after the rows before t = 0
        end, later = len(dq), len(dq) + first
        for size, earlier in zip(reversed(ctx.sizes), [*reversed(ctx.sizes[:-1]), first], strict=True):
            rows, end, later = slice(end - size, end), end - size, later - size
            by_before = [x[later - earlier :][:size] for x in by_state]
            cell.back(rows, [x[later : later + size] for x in by_state], dq[rows], by_before)
            if dq_ is not dq:
                dq_[rows] = dq[rows]
            more = slice(rows.start, rows.start + size + -size % ROWS)
            by_before[0] += torch.mm(dq_[more].flatten(1), weight_)[:size]
        if trace is not None and p is not None:
            trace.steps = p.detach(), before, [x[first:] for x in by_state]
        by_weight = (dq_.flatten(1).t() @ before[0].to(ctx.dtype)).to(weight.dtype)
        by_bias = dq.sum(0).flatten() if ctx.has_bias else None
        cell.input_gradient(by_state[0][first:], dq)
        by_norms, by_initial = cell.norm_gradients(), [x[:first] for x in by_state]
        return *(5 * [None]), dq.flatten(1), by_weight, by_bias, *by_norms, *by_initial
