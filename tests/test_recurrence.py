"""The recurrence over projected inputs is that of torch's modules: outputs, states and all gradients."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models import CORES

KINDS = ["rnn_tanh", "rnn_relu", "gru", "lstm"]


def gradients(core: Any, x: Tensor, state: Tensor, y: Tensor, after: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in (y, after)]
    loss = (y * weights[0]).sum() + (after * weights[1]).sum()
    return list(torch.autograd.grad(loss, [x, state, *core.parameters()]))


def compare(kind: str, lengths: list[int], num_layers: int, dropout: float, dtype: torch.dtype, parts: int = 1) -> None:
    """An own core against torch's module with the same weights, on sequences of these lengths."""
    torch.manual_seed(0)
    config = CoreConfig(kind=kind, hidden_size=7, num_layers=num_layers, dropout=dropout)  # type: ignore[arg-type]
    core: Any = CORES[kind](6, config).to(dtype)
    for parameter in core.parameters():
        nn.init.normal_(parameter, 0, 0.4)  # biases are not zero, as at first
    lengths = sorted(lengths, reverse=True)
    sequences_per_step = torch.tensor([sum(n > k for n in lengths) for k in range(lengths[0])])
    x = torch.randn(sum(lengths), 6, dtype=dtype, requires_grad=True)
    state = torch.randn(len(lengths), core.state_size, dtype=dtype, requires_grad=True)

    edges = [6 * part // parts for part in range(parts + 1)]
    pieces = [core.project_input(x[:, a:b], slice(a, b)) for a, b in itertools.pairwise(edges)]
    torch.manual_seed(1)
    y, after = core.unroll(core.join_inputs(pieces), state, sequences_per_step)

    h = state.view(len(lengths), -1, num_layers, 7).permute(1, 2, 0, 3)
    torch.manual_seed(1)
    want, want_after = core.rnn(PackedSequence(x, sequences_per_step), (h[0], h[1]) if kind == "lstm" else h[0])
    flat = torch.stack(want_after if kind == "lstm" else (want_after,)).permute(2, 0, 1, 3).flatten(1)

    tolerance: Any = dict.fromkeys(("rtol", "atol"), 1e-10 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(y, want.data, **tolerance)
    torch.testing.assert_close(after, flat, **tolerance)
    for own, theirs in zip(
        gradients(core, x, state, y, after), gradients(core, x, state, want.data, flat), strict=True
    ):
        torch.testing.assert_close(own / theirs.abs().max(), theirs / theirs.abs().max(), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_layers", "dropout"), [(1, 0.0), (2, 0.0), (3, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_torchs(kind: str, num_layers: int, dropout: float, dtype: torch.dtype) -> None:
    compare(kind, [9, 4, 4, 1, 1], num_layers, dropout, dtype)


@given(
    st.sampled_from(KINDS), st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 2), st.integers(1, 3)
)
def test_of_any_lengths_and_with_inputs_in_parts(kind: str, lengths: list[int], num_layers: int, parts: int) -> None:
    compare(kind, lengths, num_layers, 0.0, torch.float64, parts)
