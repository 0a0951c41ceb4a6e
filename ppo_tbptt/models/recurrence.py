"""Recurrent layers over packed sequences whose inputs are projected already: the equations of ``torch.nn``'s cells.

``torch.nn.GRU`` and its kin multiply the input of every step by the input weights. Where inputs repeat, that is done
once for each distinct one (:meth:`~ppo_tbptt.models.cores.Core.project_input`). A layer is left with its recurrence:

    p_t = W_ih x_t + b_ih  (given)      q_t = W_hh h_{t-1} + b_hh      state_t = step(p_t, q_t, state_{t-1})

The backward pass needs one product with ``W_hh`` and a few multiplications per step, because all factors that do not
depend on later steps are computed at once; the gradient of ``W_hh`` is one large product at the end.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.tanh_backward

State = list[Tensor]
"""The hidden state, and the cell state of an LSTM, ``[n, H]`` each."""
Packing = list[Any]
"""Number of sequences at each step; symbols while an agent is exported."""


class Cell:
    """The equations of one kind of layer. An object holds what its backward pass through M packed steps needs.

    factor: derivative of q by the hidden state or, for an LSTM's first three gates, by the cell state, ``[M, G, H]``.
    """

    factor: Tensor

    def __init__(self, q: Float[Tensor, "M GH"], extra: Float[Tensor, "M H"], before: State) -> None:
        """Compute the factors from what :meth:`step` left in ``q`` and ``extra``, and the state before each step."""
        raise NotImplementedError

    @staticmethod
    def step(
        p: Float[Tensor, "n GH"], q: Float[Tensor, "n GH"], extra: Float[Tensor, "n H"], before: State, after: State
    ) -> None:
        """Compute one step of n sequences into ``after``; overwrite ``q`` and ``extra``."""
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

    def __init__(self, q: Tensor, extra: Tensor, before: State) -> None:
        r, self.z, q_n = q.chunk(3, 1)
        n = extra
        self.by_n = tanh_backward(1 - self.z, n)
        self.factor = q.new_empty(len(n), 3, n.shape[1])
        sigmoid_backward.grad_input(self.by_n * q_n, r, grad_input=self.factor[:, 0])
        sigmoid_backward.grad_input(before[0] - n, self.z, grad_input=self.factor[:, 1])
        torch.mul(self.by_n, r, out=self.factor[:, 2])

    @staticmethod
    def step(p: Tensor, q: Tensor, extra: Tensor, before: State, after: State) -> None:
        """See :meth:`Cell.step`."""
        size = extra.shape[1]
        r, z, q_n = q.chunk(3, 1)
        q[:, : 2 * size].add_(p[:, : 2 * size]).sigmoid_()
        n = torch.addcmul(p[:, 2 * size :], r, q_n, out=extra).tanh_()
        torch.lerp(n, before[0], z, out=after[0])

    def back(self, rows: slice, after: State, dq: Tensor, before: State) -> None:
        """See :meth:`Cell.back`."""
        torch.mul(after[0][:, None], self.factor[rows], out=dq)
        before[0].addcmul_(after[0], self.z[rows])

    def input_gradient(self, dh: Tensor, dq: Tensor) -> None:
        """See :meth:`Cell.input_gradient`."""
        torch.mul(dh, self.by_n, out=dq[:, 2])


class LSTM(Cell):
    """``i, f, o = sigmoid(p + q)``, ``g = tanh(p + q)``, ``c' = f c + i g``, ``h' = o tanh(c')``."""

    def __init__(self, q: Tensor, extra: Tensor, before: State) -> None:
        i, self.f, g, o = q.chunk(4, 1)
        tanh_c = extra
        self.c_by_h = tanh_backward(o, tanh_c)
        self.factor = q.new_empty(len(q), 4, extra.shape[1])
        sigmoid_backward.grad_input(g, i, grad_input=self.factor[:, 0])
        sigmoid_backward.grad_input(before[1], self.f, grad_input=self.factor[:, 1])
        tanh_backward.grad_input(i, g, grad_input=self.factor[:, 2])
        sigmoid_backward.grad_input(tanh_c, o, grad_input=self.factor[:, 3])

    @staticmethod
    def step(p: Tensor, q: Tensor, extra: Tensor, before: State, after: State) -> None:
        """See :meth:`Cell.step`."""
        i, f, g, o = q.add_(p).chunk(4, 1)
        for gate in (i, f, o):
            gate.sigmoid_()
        torch.addcmul(f * before[1], i, g.tanh_(), out=after[1])
        torch.mul(o, torch.tanh(after[1], out=extra), out=after[0])

    def back(self, rows: slice, after: State, dq: Tensor, before: State) -> None:
        """See :meth:`Cell.back`."""
        dh, factor = after[0], self.factor[rows]
        dc = torch.addcmul(after[1], dh, self.c_by_h[rows])
        torch.mul(dc[:, None], factor[:, :3], out=dq[:, :3])
        torch.mul(dh, factor[:, 3], out=dq[:, 3])
        before[1].addcmul_(dc, self.f[rows])


class TanhRNN(Cell):
    """``h' = tanh(p + q)``."""

    def __init__(self, q: Tensor, extra: Tensor, before: State) -> None:
        self.factor = (1 - extra * extra)[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, extra: Tensor, before: State, after: State) -> None:
        """See :meth:`Cell.step`."""
        after[0].copy_(torch.add(p, q, out=extra).tanh_())


class ReluRNN(Cell):
    """``h' = relu(p + q)``."""

    def __init__(self, q: Tensor, extra: Tensor, before: State) -> None:
        self.factor = (extra > 0).to(extra.dtype)[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, extra: Tensor, before: State, after: State) -> None:
        """See :meth:`Cell.step`."""
        after[0].copy_(torch.add(p, q, out=extra).relu_())


def run(
    cell: type[Cell],
    p: Float[Tensor, "M GH"],
    state: State,
    weight: Float[Tensor, "GH H"],
    bias: Float[Tensor, "GH"],
    sequences_per_step: Packing,
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

    Returns:
        The state after every step, packed.
    """
    kind = p.device.type
    dtype = torch.get_autocast_dtype(kind) if kind == "cpu" and torch.is_autocast_enabled(kind) else weight.dtype
    if len(sequences_per_step) == 1 and not torch.is_grad_enabled():
        q = torch.addmm(bias.to(dtype), state[0].to(dtype), weight.to(dtype).t()).to(p.dtype)
        after = [torch.empty_like(x) for x in state]
        cell.step(p, q, torch.empty_like(state[0]), state, after)
        return after
    return list(_Recurrence.apply(cell, sequences_per_step, dtype, p, weight, bias, *state))


def _steps(sizes: Packing) -> Iterator[tuple[slice, slice, slice]]:
    """Yield each step's rows; in a tensor that begins with the initial rows, those before the step and after it."""
    begin, earlier = 0, 0
    for size in sizes:
        after = sizes[0] + begin
        yield slice(begin, begin + size), slice(earlier, earlier + size), slice(after, after + size)
        begin, earlier = begin + size, after


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: type[Cell], sizes: Packing, dtype: torch.dtype, *tensors: Tensor) -> Any:
        p, weight, bias, *initial = tensors
        transposed, bias = weight.to(dtype).t(), bias.to(dtype)
        first, size = initial[0].shape
        q, extra, h = torch.empty_like(p), p.new_empty(len(p), size), p.new_empty(len(p), size, dtype=dtype)
        states = [x.new_empty(first + len(p), size) for x in initial]
        for x, start in zip(states, initial, strict=True):
            x[:first] = start
        for rows, earlier, later in _steps(sizes):
            h[rows] = states[0][earlier]
            q[rows] = torch.addmm(bias, h[rows], transposed)
            cell.step(p[rows], q[rows], extra[rows], [x[earlier] for x in states], [x[later] for x in states])
        ctx.cell, ctx.sizes = cell, sizes
        ctx.save_for_backward(weight, q, extra, h, *states)
        return tuple(x[first:] for x in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, q, extra, h, *states = ctx.saved_tensors
        steps, first = list(_steps(ctx.sizes)), ctx.sizes[0]
        cell = ctx.cell(q, extra, [torch.cat([x[earlier] for _, earlier, _ in steps]) for x in states])
        weight_ = weight.to(h.dtype)
        by_state = [torch.cat((x.new_zeros(first, x.shape[1]), x)) for x in gradients]
        dq = torch.empty_like(cell.factor)
        dq_ = dq if h.dtype == dq.dtype else torch.empty_like(dq, dtype=h.dtype)
        for rows, earlier, later in reversed(steps):
            before = [x[earlier] for x in by_state]
            cell.back(rows, [x[later] for x in by_state], dq[rows], before)
            if dq_ is not dq:
                dq_[rows] = dq[rows]
            before[0] += torch.mm(dq_[rows].flatten(1), weight_)
        by_weight = (dq_.flatten(1).t() @ h).to(weight.dtype)
        by_bias = dq.sum(0).flatten()
        cell.input_gradient(by_state[0][first:], dq)
        return None, None, None, dq.flatten(1), by_weight, by_bias, *(x[:first] for x in by_state)
