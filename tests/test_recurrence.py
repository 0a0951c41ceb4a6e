"""The recurrence over projected inputs is that of torch's modules, or of a loop: outputs, states and all gradients."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference_training import cell
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models import CORES, Core

KINDS = ["rnn_tanh", "rnn_relu", "gru", "lstm", "ln_gru", "ln_lstm"]


def gradients(core: Any, x: Tensor, state: Tensor, y: Tensor, after: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in (y, after)]
    loss = (y * weights[0]).sum() + (after * weights[1]).sum()
    return list(torch.autograd.grad(loss, [x, state, *core.parameters()]))


def compare(
    kind: Any,
    lengths: list[int],
    num_layers: int,
    dropout: float,
    dtype: torch.dtype,
    execution: Any = "packed",
    parts: int = 1,
) -> None:
    """An own core against torch's module, or a loop, with the same weights, on sequences of these lengths."""
    torch.manual_seed(0)
    config = CoreConfig(kind=kind, hidden_size=7, num_layers=num_layers, dropout=dropout, execution=execution)
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
    if kind.startswith("ln_"):
        want, want_after = loop(core, kind, x, h, sequences_per_step.tolist())
    else:
        packed = PackedSequence(x, sequences_per_step)
        (want, *_), want_after = core.rnn(packed, (h[0], h[1]) if kind == "lstm" else h[0])
    flat = torch.stack(want_after if "lstm" in kind else (want_after,)).permute(2, 0, 1, 3).flatten(1)

    tolerance: Any = dict.fromkeys(("rtol", "atol"), 1e-10 if dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(y, want, **tolerance)
    torch.testing.assert_close(after, flat, **tolerance)
    for own, theirs in zip(gradients(core, x, state, y, after), gradients(core, x, state, want, flat), strict=True):
        scale = theirs.abs().max().clamp(min=1e-30)  # ReLU's units may all be shut
        torch.testing.assert_close(own / scale, theirs / scale, **tolerance)


def loop(core: Any, kind: str, x: Tensor, state: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    """Layer by layer, step by step, sequence by sequence: packed outputs, and the state after each last step."""
    lasts = []
    for layer in range(core.rnn.num_layers):
        if layer:
            x = F.dropout(x, core.rnn.dropout, core.training)
        now, outputs = [list(parts) for parts in state[:, layer].unbind(1)], []
        for size, rows in zip(sizes, x.split(sizes), strict=True):
            for s in range(size):
                h, c = cell(core, kind, layer, rows[s], now[s][0], now[s][-1])
                now[s] = [h, c][: len(state)]
                outputs.append(h)
        x = torch.stack(outputs)
        lasts.append(torch.stack([torch.stack(parts) for parts in now], 1))
    after = torch.stack(lasts, 1)
    return x, tuple(after) if len(state) == 2 else after[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_layers", "dropout"), [(1, 0.0), (2, 0.0), (3, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_it_is_torchs(kind: str, num_layers: int, dropout: float, dtype: torch.dtype, execution: str) -> None:
    compare(kind, [9, 4, 4, 1, 1], num_layers, dropout, dtype, execution)


@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 2),
    st.sampled_from(["packed", "padded"]),
    st.integers(1, 3),
)
def test_of_any_lengths_and_with_inputs_in_parts(
    kind: str, lengths: list[int], num_layers: int, execution: str, parts: int
) -> None:
    compare(kind, lengths, num_layers, 0.0, torch.float64, execution, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_cores_that_know_nothing_but_forward_are_padded_alike(kind: Any) -> None:
    """As cuDNN is, and a core of the user's own may be."""
    core = CORES[kind](6, CoreConfig(kind=kind, hidden_size=7, num_layers=2)).double()
    packing = torch.tensor([5, 4, 2, 2, 1, 1])
    x = core.project_input(torch.randn(15, 6, dtype=torch.float64), slice(0, 6)).detach().requires_grad_()
    state = torch.randn(5, core.state_size, dtype=torch.float64, requires_grad=True)
    results, widths = [], []
    core.register_forward_pre_hook(lambda _, inputs: widths.append((inputs[0].shape[1], len(inputs[1]))))
    for padded in (False, True):
        core.padded = padded
        y, after = Core.unroll(core, x, state, packing)
        weights = [p for name, p in core.named_parameters() if "ih_l0" not in name]
        results.append([y, after, *torch.autograd.grad(y.sum() + after.sum(), [x, state, *weights])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)
    assert widths == [(5, 5), (4, 4), (2, 2), (1, 1)] + 4 * [(5, 5)]


def test_a_sequence_that_has_ended_cannot_spoil_the_others() -> None:
    """Its state would be 3^200 after them, and its gradient 0 times infinity."""
    core = CORES["rnn_relu"](4, CoreConfig(kind="rnn_relu", hidden_size=4, execution="padded"))
    with torch.no_grad():
        core.get_parameter("rnn.weight_hh_l0").copy_(3 * torch.eye(4))
    x = -torch.ones(201, 4)
    y, after = core.unroll(x, torch.arange(2)[:, None].expand(2, 4).float(), torch.tensor([2, *[1] * 199]))
    (y.sum() + after.sum()).backward()
    assert y.isfinite().all() and after.isfinite().all()
    assert core.get_parameter("rnn.weight_hh_l0").grad.isfinite().all()  # type: ignore[union-attr]
