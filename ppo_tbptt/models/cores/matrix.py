"""Matrix memories: each head keeps a matrix that maps keys to values. It is written to by outer products.

A head with a state S ``[d, d]`` (a row for each entry of the key) decays it, writes w at the key k, and reads at q:

    S_t = alpha_t S_{t-1} + k_t^T w_t        o_t = q_t S_t

Retention writes the value, ``w_t = v_t``, gated delta what is missing there, ``beta_t (v_t - alpha_t k_t S_{t-1})``.

While acting these equations run as they stand. Updates run them by chunks of C steps (Sun et al. 2023, section 2.3, and
Yang et al. 2024, section 3.3), so that no more than one matrix per chunk is kept for the backward pass, and nearly all
arithmetic is in matrix products. With S the state before the chunk, K, Q, V and W its rows, a_i the product of the
decays up to step i, and D_ij = a_i / a_j for j <= i, else 0:

    O = a * Q S + (Q K^T * D) W        S_after = a_C S + (a_C / a * K)^T W

The writes of gated delta depend on those before them: ``(1 + tril(beta * K K^T * D, -1)) W = beta * (V - a * K S)``, a
triangular system. It is solved for both terms on the right before S is known (the WY representation), by substitution:
an inverse made of powers of the matrix would cancel digits where keys repeat. Updates that loop over packed steps take
1.7 to 8 times as long (heads of 32 and 64, sequences of 32 and 128, float32, one thread).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models.cores.core import Core
from ppo_tbptt.runtime.pinned import to_device

CHUNK = 16
"""Steps of a chunk, C. 32 is up to a fifth faster for heads of 64 and sequences of one length, and up to two fifths
slower for sequences of many lengths, whose last chunks are filled up."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the equations need of M steps with h heads, or of n chunks of C steps each."""

    q: Float[Tensor, "*M h d"]
    k: Float[Tensor, "*M h d"]
    v: Float[Tensor, "*M h d"]
    log_decay: Float[Tensor, "*M h"]
    """Logarithm of alpha."""
    beta: Float[Tensor, "*M h"] | None = None
    """How much of what is missing is written; None: the value itself is."""


class MatrixMemory(Core):
    """Layers of heads with a matrix each. The state is laid out as ``[layer, head, key, value]``.

    A layer projects its input to queries, keys, values, an output gate and what a subclass adds for each head. The
    heads' outputs are normalised to a root mean square of 1 each, which is how the authors of both papers compute their
    group norm, multiplied by the swish of the gate, and projected.
    """

    gates_per_head: ClassVar[int]
    wide_state = True

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.head_size, self.dropout = config.num_heads, size // config.num_heads, config.dropout
        self.state_size, self.output_size = config.num_layers * size * self.head_size, size
        self.padded = config.execution == "padded"
        self._widths = [size] * 4 + [self.num_heads] * self.gates_per_head
        inputs = [input_size, *[size] * (config.num_layers - 1)]
        self.projections = nn.ModuleList(nn.Linear(width, sum(self._widths), bias=False) for width in inputs)
        self.outputs = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in inputs)
        with torch.no_grad():
            for projection, output in zip(self.projections, self.outputs, strict=True):
                for weight in (*projection.get_parameter("weight").split(self._widths), output.get_parameter("weight")):
                    nn.init.orthogonal_(weight, 2**0.5)
        if config.initial_state == "learnt":
            self.learnt_state = nn.Parameter(torch.zeros(self.state_size))

    @abstractmethod
    def terms(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *gates: Float[Tensor, "M h"]) -> Terms:
        """Make the equations' terms of M projected inputs; q, k and v are ``[M, h, d]``."""
        raise NotImplementedError

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """Multiply by these columns of the first layer's weights."""
        return F.linear(x, self.projections[0].get_parameter("weight")[:, columns])

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """Add the projections."""
        return sum(parts[1:], parts[0])

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        if len(x) > 1:
            y, state = self.unroll(x.flatten(0, 1), state, torch.full((len(x),), x.shape[1]))
            return y.unflatten(0, x.shape[:2]), state
        y, state = self._run(x[0], state, _step)
        return y[None], state

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        return self._run(x, state, _Chunks(sequences_per_step, self.padded, x.device))

    def _run(
        self,
        p: Float[Tensor, "M P"],
        state: Float[Tensor, "S D"],
        recur: Callable[[Terms, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """Run all layers, each with ``recur`` from its terms and state ``[S, h, d, d]``."""
        y, after = p, []
        before = state.unflatten(1, (len(self.projections), self.num_heads, self.head_size, self.head_size))
        for layer, (project, output) in enumerate(zip(self.projections, self.outputs, strict=True)):
            if layer:
                p = project(F.dropout(y, self.dropout, self.training))
            *qkv, gate, rest = p.to(state.dtype).split([*self._widths[:4], sum(self._widths[4:])], 1)
            q, k, v = (x.unflatten(1, (self.num_heads, self.head_size)) for x in qkv)
            with _without_autocast(p.device.type):
                o, s = recur(self.terms(layer, q, k, v, *rest.split(self._widths[4:], 1)), before[:, layer])
                o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
            y = output(o.flatten(1) * F.silu(gate))
            after.append(s)
        return y, (after[0][:, None] if len(after) == 1 else torch.stack(after, 1)).flatten(1)


class Retention(MatrixMemory):
    """The retentive network (Sun et al. 2023, https://arxiv.org/abs/2307.08621): heads forget at rates of their own.

    Without the paper's rotation of queries and keys by their position: in the recurrence it would either count steps or
    turn the whole state at every step, and the decay tells old from new already.
    """

    gates_per_head = 0

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__(input_size, config)
        decay = 1 - 2.0 ** (-5 - torch.arange(self.num_heads))
        self.register_buffer("log_decay", decay.log(), persistent=False)

    def terms(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *gates: Float[Tensor, "M h"]) -> Terms:
        """See :meth:`MatrixMemory.terms`."""
        return Terms(q * self.head_size**-0.5, k, v, self.get_buffer("log_decay").expand(q.shape[:2]))


class GatedDelta(MatrixMemory):
    """The gated delta network (Yang et al. 2024, https://arxiv.org/abs/2412.06464): what a key held is replaced.

    A learnt decay, as in Mamba2, forgets everything. Without the paper's short convolutions, whose last inputs would be
    one more state.
    """

    gates_per_head = 2

    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__(input_size, config)
        shape = config.num_layers, self.num_heads
        step = torch.empty(shape).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.log_rate = nn.Parameter(torch.empty(shape).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(step + (-(-step).expm1()).log())  # softplus makes it the step again

    def terms(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *gates: Float[Tensor, "M h"]) -> Terms:
        """See :meth:`MatrixMemory.terms`; ``alpha = exp(-rate softplus(gate + bias))``."""
        decay, strength = gates
        log_decay = -self.log_rate[layer].exp() * F.softplus(decay + self.step_bias[layer])
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        return Terms(q, k, F.silu(v), log_decay, strength.sigmoid())

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """See :meth:`Core.gates`: alpha and beta of each head."""
        gates = []

        def observed(terms: Terms, s: Tensor) -> tuple[Tensor, Tensor]:
            assert terms.beta is not None
            gates.append(torch.stack((terms.log_decay.exp(), terms.beta), 1))
            return _step(terms, s)

        self._run(x, state, observed)
        return gates


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()


def _step(x: Terms, s: Float[Tensor, "M h d d"]) -> tuple[Float[Tensor, "M h d"], Float[Tensor, "M h d d"]]:
    """Take one step; return the output and the state after it."""
    decay, w = x.log_decay.exp()[..., None], x.v
    if x.beta is None:
        of_q = (x.q[..., None, :] @ s)[..., 0, :]
    else:
        of_q, of_k = (torch.stack((x.q, x.k), -2) @ s).unbind(-2)
        w = x.beta[..., None] * (x.v - decay * of_k)
    o = decay * of_q + (x.q * x.k).sum(-1, keepdim=True) * w
    return o, torch.addcmul(decay[..., None] * s, x.k[..., None], w[..., None, :])


class _Chunks:
    """Cuts packed sequences into chunks of C steps, which are packed as the steps are: all first ones, then all second.

    A sequence's last chunk is filled up with steps that write nothing and don't decay. If ``padded``, so is every
    sequence up to the longest.
    """

    def __init__(self, sequences_per_step: Int[Tensor, "L"], padded: bool, device: torch.device) -> None:
        steps = torch.arange(len(sequences_per_step)).repeat_interleave(sequences_per_step)  # [M]
        first = (sequences_per_step.cumsum(0) - sequences_per_step)[steps]
        self.size = min(CHUNK, len(sequences_per_step))
        counts = sequences_per_step[:: self.size]  # sequences that have a c-th chunk
        if padded:
            counts = torch.full_like(counts, int(sequences_per_step[0]))
        chunk = (counts.cumsum(0) - counts)[steps // self.size] + torch.arange(len(steps)) - first
        self.counts = counts.tolist()
        self.position = to_device(chunk * self.size + steps % self.size, device)

    def _chunked(self, x: Float[Tensor, "M h ..."]) -> Float[Tensor, "n h C ..."]:
        slots = x.new_zeros(sum(self.counts) * self.size, *x.shape[1:])
        return slots.index_copy(0, self.position, x).unflatten(0, (-1, self.size)).transpose(1, 2).contiguous()

    def __call__(
        self, x: Terms, s: Float[Tensor, "S h d d"]
    ) -> tuple[Float[Tensor, "M h d"], Float[Tensor, "S h d d"]]:
        """Return the output of every step, and the state after each sequence's last."""
        q, k, v, log_decay = map(self._chunked, (x.q, x.k, x.v, x.log_decay))
        log_a = log_decay @ log_decay.new_ones(self.size, self.size).triu()  # summed up to each step
        a, to_end = log_a.exp()[..., None], (log_a[..., -1:] - log_a).exp()[..., None]
        d = (log_a[..., :, None] - log_a[..., None, :]).tril().exp().tril()  # [n, h, C, C]
        terms = [a[..., -1:, :], (to_end * k).mT, v]
        if x.beta is not None:
            beta = self._chunked(x.beta)[..., None]
            both = beta * torch.cat((v, a * k), -1)
            both = torch.linalg.solve_triangular(beta * (k @ k.mT) * d, both, upper=False, unitriangular=True)
            terms[2:] = both.chunk(2, -1)
        writes, states, ended = [], [], []
        pieces = zip(*(y.split(self.counts) for y in terms), strict=True)
        for count, (decay, k_end, w, *of_s) in zip(self.counts, pieces, strict=True):
            if count < len(s):
                ended.append(s[count:])
                s = s[:count]
            w = w - of_s[0] @ s if of_s else w
            writes.append(w)
            states.append(s)
            s = decay * s + k_end @ w
        o = (a * q) @ torch.cat(states) + ((q @ k.mT) * d) @ torch.cat(writes)
        return o.transpose(1, 2).flatten(0, 1).index_select(0, self.position), torch.cat([s, *ended[::-1]])
