"""Recurrent layers over packed sequences whose inputs are projected already: the equations of ``torch.nn``'s cells.

``torch.nn.GRU`` and its kin multiply the input of every step by the input weights. Where inputs repeat, that is done
once for each distinct one (:meth:`~ppo_tbptt.models.cores.Core.project_input`). A layer is left with its recurrence:

    p_t = W_ih x_t + b_ih  (given)      q_t = W_hh h_{t-1} + b_hh      state_t = step(p_t, q_t, state_{t-1})

The backward pass needs one product with ``W_hh`` and a few multiplications per step, because all factors that do not
depend on later steps are computed at once; the gradient of ``W_hh`` is one large product at the end. That and keeping
the gates took the backward pass of a GRU of 128 through 6,924 steps from 28 to 20 ms (bfloat16, one thread).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward

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
    bias: Float[Tensor, "GH"]
    num_sequences: int
    """S: so many steps are the first ones of their sequences."""
    steps: tuple[Float[Tensor, "M GH"], State, State] | None = None
    """p, the state before each step, and the gradient by the state after it: of all losses, those of later steps
    included. None before the backward pass."""


ROWS = 8
"""Products with ``W_hh`` are of so many rows or a multiple, where there are such; see :func:`.pad_rows`. With that an
update of cpu/mortar_mayhem_grid takes 0.66 s instead of 0.81."""


class Cell:
    """The equations of one kind of layer. An object holds what its backward pass through M packed steps needs.

    factor: derivative of q by the hidden state or, for an LSTM's first three gates, by the cell state, ``[M, G, H]``.
    """

    factor: Tensor

    def __init__(self, before: State, kept: Kept) -> None:
        """Compute the factors from the state before each step, and what :meth:`step` kept of it."""
        raise NotImplementedError

    @staticmethod
    def step(p: Float[Tensor, "n GH"], q: Float[Tensor, "n GH"], state: State) -> tuple[State, Kept]:
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
    def step(p: Tensor, q: Tensor, state: State) -> tuple[State, Kept]:
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
    def step(p: Tensor, q: Tensor, state: State) -> tuple[State, Kept]:
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
        dc = torch.addcmul(after[1], dh, self.c_by_h[rows])
        torch.mul(dc[:, None], factor[:, :3], out=dq[:, :3])
        torch.mul(dh, factor[:, 3], out=dq[:, 3])
        before[1].addcmul_(dc, self.f[rows])


class TanhRNN(Cell):
    """``h' = tanh(p + q)``."""

    def __init__(self, before: State, kept: Kept) -> None:
        self.factor = (1 - kept[0] * kept[0])[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State) -> tuple[State, Kept]:
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
    def step(p: Tensor, q: Tensor, state: State) -> tuple[State, Kept]:
        """See :meth:`Cell.step`."""
        h = (p + q).relu()
        return [h], (h,)

    @staticmethod
    def gates(kept: Kept) -> Tensor:
        """See :meth:`Cell.gates`; a unit is saturated where it is off."""
        return (kept[0] > 0).to(kept[0].dtype)[:, None] / 2


def run(
    cell: type[Cell],
    p: Float[Tensor, "M GH"],
    state: State,
    weight: Float[Tensor, "GH H"],
    bias: Float[Tensor, "GH"],
    sequences_per_step: Packing,
    trace: Trace | None = None,
) -> State:
    """Run a layer over packed sequences (see :class:`~ppo_tbptt.types.Minibatch`); gradients go to all tensors.

    Products with ``weight`` are in autocast's type, all else is in that of ``p``.

    Args:
        cell: the equations.
        p: projected inputs, packed.
        state: before the first step of each sequence.
        weight: ``W_hh``.
        bias: ``b_hh``.
        sequences_per_step: the packing.
        trace: filled by the backward pass.

    Returns:
        The state after every step, packed.
    """
    kind = p.device.type
    dtype = torch.get_autocast_dtype(kind) if kind == "cpu" and torch.is_autocast_enabled(kind) else weight.dtype
    if len(sequences_per_step) == 1 and not torch.is_grad_enabled():
        q = torch.addmm(bias.to(dtype), state[0].to(dtype), weight.to(dtype).t())
        return cell.step(p, q.to(p.dtype), state)[0]
    return list(_Recurrence.apply(cell, sequences_per_step, dtype, trace, p, weight, bias, *state))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: type[Cell], sizes: Packing, dtype: torch.dtype, trace: Trace | None, *tensors: Tensor
    ) -> Any:
        p, weight, bias, *state = tensors
        transposed, bias = weight.to(dtype).t(), bias.to(dtype)
        steps: list[tuple[Tensor, ...]] = []
        begin, rows = 0, len(state[0])
        for size in sizes:
            # Of sequences that have ended a few go on, and are left out of the result: new shapes cost more.
            rows = min(rows, size + -size % ROWS, len(p) - begin)
            before = [x[:rows] for x in state]
            q = torch.addmm(bias, before[0].to(dtype), transposed).to(p.dtype)
            state, kept = cell.step(p[begin : begin + rows], q, before)
            steps.append(tuple(x[:size] for x in (*state, *before, *kept)))
            begin += size
        packed = [torch.cat(x) for x in zip(*steps, strict=True)]
        ctx.cell, ctx.sizes, ctx.dtype, ctx.trace = cell, sizes, dtype, trace
        ctx.save_for_backward(weight, *([] if trace is None else [p]), *packed[len(state) :])
        return tuple(packed[: len(state)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, *tensors = ctx.saved_tensors
        trace: Trace | None = ctx.trace
        p = tensors.pop(0) if trace is not None else None
        before, kept = tensors[: len(gradients)], tensors[len(gradients) :]
        cell, weight_ = ctx.cell(before, kept), weight.to(ctx.dtype)
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
        by_bias = dq.sum(0).flatten()
        cell.input_gradient(by_state[0][first:], dq)
        return None, None, None, None, dq.flatten(1), by_weight, by_bias, *(x[:first] for x in by_state)
