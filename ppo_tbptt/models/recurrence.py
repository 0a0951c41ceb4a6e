"""Recurrent layers over packed sequences whose inputs are projected already: the equations of ``torch.nn``'s cells.

``torch.nn.GRU`` and its kin multiply the input of every step by the input weights. Where inputs repeat, that is done
once for each distinct one (:meth:`~ppo_tbptt.models.cores.Core.project_input`). A layer is left with its recurrence:

    p_t = W_ih x_t + b_ih  (given)      q_t = W_hh h_{t-1} + b_hh      state_t = step(p_t, q_t, state_{t-1})

The backward pass needs one product with ``W_hh`` and a few multiplications per step, because all factors that do not
depend on later steps are computed at once; the gradient of ``W_hh`` is one large product at the end.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

State = list[Tensor]
"""The hidden state, and the cell state of an LSTM, ``[n, H]`` each."""
Packing = list[Any]
"""Number of sequences at each step; symbols while an agent is exported."""


class Cell:
    """The equations of one kind of layer. An object holds what its backward pass through M packed steps needs.

    factor: derivative of q by the hidden state or, for an LSTM's first three gates, by the cell state, ``[M, G, H]``.
    """

    factor: Tensor

    def __init__(self, p: Float[Tensor, "M GH"], q: Float[Tensor, "M GH"], state: State) -> None:
        """Compute the factors; ``state`` is that before each step."""
        raise NotImplementedError

    @staticmethod
    def step(p: Float[Tensor, "n GH"], q: Float[Tensor, "n GH"], state: State) -> State:
        """Return the state after one step of n sequences."""
        raise NotImplementedError

    @staticmethod
    def gates(p: Float[Tensor, "M GH"], q: Float[Tensor, "M GH"]) -> Float[Tensor, "M _ H"]:
        """Return what may saturate at 0 and 1: the sigmoid gates; of a cell without any its units, scaled to that."""
        raise NotImplementedError

    def back(self, rows: slice, gradient: State, dq: Float[Tensor, "n G H"]) -> State:
        """Go back through the step ``rows`` from the loss by the state after it; fill ``dq``.

        Returns:
            The loss by the state before it, as far as that does not go through q.
        """
        torch.mul(gradient[0][:, None], self.factor[rows], out=dq)
        return [torch.zeros_like(gradient[0])]

    def input_gradient(self, dh: Float[Tensor, "M H"], dq: Float[Tensor, "M GH"]) -> Float[Tensor, "M GH"]:
        """Return the loss by p, from that by the hidden states and by q."""
        return dq


class GRU(Cell):
    """``r, z = sigmoid(p + q)``, ``n = tanh(p + r q)``, ``h' = (1 - z) n + z h``."""

    def __init__(self, p: Tensor, q: Tensor, state: State) -> None:
        r, z, n, q_n = self._gates(p, q)
        self.z, self.by_n = z, (1 - z) * (1 - n * n)
        self.factor = torch.stack((self.by_n * q_n * r * (1 - r), (state[0] - n) * z * (1 - z), self.by_n * r), 1)

    @staticmethod
    def _gates(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return r, z and n, and q's part of n."""
        size = p.shape[1] // 3
        r, z = (p[:, : 2 * size] + q[:, : 2 * size]).sigmoid().chunk(2, 1)
        q_n = q[:, 2 * size :]
        return r, z, torch.addcmul(p[:, 2 * size :], r, q_n).tanh(), q_n

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State) -> State:
        """See :meth:`Cell.step`."""
        _, z, n, _ = GRU._gates(p, q)
        return [torch.lerp(n, state[0], z)]

    @staticmethod
    def gates(p: Tensor, q: Tensor) -> Tensor:
        """See :meth:`Cell.gates`."""
        return torch.stack(GRU._gates(p, q)[:2], 1)

    def back(self, rows: slice, gradient: State, dq: Tensor) -> State:
        """See :meth:`Cell.back`."""
        torch.mul(gradient[0][:, None], self.factor[rows], out=dq)
        return [gradient[0] * self.z[rows]]

    def input_gradient(self, dh: Tensor, dq: Tensor) -> Tensor:
        """See :meth:`Cell.input_gradient`."""
        return torch.cat((dq[:, : 2 * dh.shape[1]], dh * self.by_n), 1)


class LSTM(Cell):
    """``i, f, o = sigmoid(p + q)``, ``g = tanh(p + q)``, ``c' = f c + i g``, ``h' = o tanh(c')``."""

    def __init__(self, p: Tensor, q: Tensor, state: State) -> None:
        c = state[1]
        i, self.f, g, o = self._gates(p + q)
        f, tanh_c = self.f, torch.addcmul(self.f * c, i, g).tanh_()
        self.c_by_h = o * (1 - tanh_c * tanh_c)
        self.factor = torch.stack((g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)), 1)

    @staticmethod
    def _gates(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        i, f, g, o = x.chunk(4, 1)
        return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State) -> State:
        """See :meth:`Cell.step`."""
        i, f, g, o = LSTM._gates(p + q)
        c = torch.addcmul(f * state[1], i, g)
        return [o * c.tanh(), c]

    @staticmethod
    def gates(p: Tensor, q: Tensor) -> Tensor:
        """See :meth:`Cell.gates`."""
        i, f, _, o = LSTM._gates(p + q)
        return torch.stack((i, f, o), 1)

    def back(self, rows: slice, gradient: State, dq: Tensor) -> State:
        """See :meth:`Cell.back`."""
        dh, factor = gradient[0], self.factor[rows]
        dc = torch.addcmul(gradient[1], dh, self.c_by_h[rows])
        torch.mul(dc[:, None], factor[:, :3], out=dq[:, :3])
        torch.mul(dh, factor[:, 3], out=dq[:, 3])
        return [torch.zeros_like(dh), dc * self.f[rows]]


class TanhRNN(Cell):
    """``h' = tanh(p + q)``."""

    def __init__(self, p: Tensor, q: Tensor, state: State) -> None:
        h = self.step(p, q, state)[0]
        self.factor = (1 - h * h)[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State) -> State:
        """See :meth:`Cell.step`."""
        return [(p + q).tanh()]

    @staticmethod
    def gates(p: Tensor, q: Tensor) -> Tensor:
        """See :meth:`Cell.gates`."""
        return ((p + q).tanh()[:, None] + 1) / 2


class ReluRNN(Cell):
    """``h' = relu(p + q)``."""

    def __init__(self, p: Tensor, q: Tensor, state: State) -> None:
        self.factor = (p + q > 0).to(p.dtype)[:, None]

    @staticmethod
    def step(p: Tensor, q: Tensor, state: State) -> State:
        """See :meth:`Cell.step`."""
        return [(p + q).relu()]

    @staticmethod
    def gates(p: Tensor, q: Tensor) -> Tensor:
        """See :meth:`Cell.gates`; a unit is saturated where it is off."""
        return (p + q > 0).to(p.dtype)[:, None] / 2


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
        q = torch.addmm(bias.to(dtype), state[0].to(dtype), weight.to(dtype).t())
        return cell.step(p, q.to(p.dtype), state)
    return list(_Recurrence.apply(cell, sequences_per_step, dtype, p, weight, bias, *state))


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, cell: type[Cell], sizes: Packing, dtype: torch.dtype, *tensors: Tensor) -> Any:
        p, weight, bias, *state = tensors
        transposed, bias = weight.to(dtype).t(), bias.to(dtype)
        q = torch.empty_like(p, dtype=dtype)
        before, after = ([x.new_empty(len(p), x.shape[1]) for x in state] for _ in range(2))
        begin = 0
        for size in sizes:
            rows, begin = slice(begin, begin + size), begin + size
            state = [x[:size] for x in state]
            torch.addmm(bias, state[0].to(dtype), transposed, out=q[rows])
            for stored, x in zip(before, state, strict=True):
                stored[rows] = x
            state = cell.step(p[rows], q[rows].to(p.dtype), state)
            for stored, x in zip(after, state, strict=True):
                stored[rows] = x
        ctx.cell, ctx.sizes, ctx.dtype = cell, sizes, dtype
        ctx.save_for_backward(p, q, weight, *before)
        return tuple(after)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        p, q, weight, *before = ctx.saved_tensors
        cell, weight_, size = ctx.cell(p, q.to(p.dtype), before), weight.to(ctx.dtype), before[0].shape[1]
        by_state = [x.clone() for x in gradients]
        dq = p.new_empty(len(p), p.shape[1] // size, size)
        by_earlier = [x[:0] for x in before]
        end = len(p)
        for count in reversed(ctx.sizes):
            rows, end = slice(end - count, end), end - count
            for stored, x in zip(by_state, by_earlier, strict=True):
                stored[rows][: len(x)] += x
            by_earlier = cell.back(rows, [x[rows] for x in by_state], dq[rows])
            by_earlier[0] += torch.mm(dq[rows].flatten(1).to(ctx.dtype), weight_)
        by_q = dq.flatten(1)
        by_weight = (by_q.to(ctx.dtype).t() @ before[0].to(ctx.dtype)).to(weight.dtype)
        by_p = cell.input_gradient(by_state[0], by_q)
        return None, None, None, by_p, by_weight, by_q.sum(0), *by_earlier
