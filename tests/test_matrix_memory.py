"""Matrix memories equal their papers' recurrences, one step of one sequence at a time."""

import math
from typing import Any

import pytest
import torch
from configs_for_tests import base, error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ppo_tbptt.config import Config, CoreConfig
from ppo_tbptt.models import CORES

KINDS = ["retention", "gated_delta"]
WIDTH, SIZE = 5, 6


def parameters(core: Any, layer: int) -> list[Tensor]:
    names = [f"projections.{layer}.weight", f"outputs.{layer}.weight"]
    return [core.get_parameter(name) for name in names]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def naive_head(core: Any, kind: str, layer: int, head: int, q: Tensor, k: Tensor, v: Tensor, gates: Any, s: Tensor) -> Any:
    """One step of one head, with the state as keys by values: its output, normalised, and the state."""
    d = len(q)
    if kind == "retention":
        s = (1 - 2.0 ** (-5 - head)) * s + torch.outer(k, v)  # equation 6
        o = (q / math.sqrt(d)) @ s
    else:
        rate, bias = core.get_parameter("log_rate")[layer, head].exp(), core.get_parameter("step_bias")[layer, head]
        alpha = (1 + (gates[0] + bias).exp()) ** -rate  # exp(-rate softplus(.))
        beta = 1 / (1 + (-gates[1]).exp())
        q, k, v = silu(q), silu(k), silu(v)
        q, k = q / q.norm(), k / k.norm()
        s = (alpha * (torch.eye(d) - beta * torch.outer(k, k))) @ s + beta * torch.outer(k, v)  # equation 10, transposed
        o = q @ s
    return o / ((o**2).mean() + 1e-5).sqrt(), s


def naive(core: Any, kind: str, config: CoreConfig, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence ``[L, WIDTH]``: the outputs and the state after the last step."""
    heads, d = config.num_heads, SIZE // config.num_heads
    states = list(state.view(config.num_layers, heads, d, d))
    outputs = []
    for x in xs:
        y = x
        for layer in range(config.num_layers):
            weight, output = parameters(core, layer)
            p = weight @ y
            q, k, v, gate = p[: 4 * SIZE].view(4, heads, d)
            own = p[4 * SIZE :].view(-1, heads)
            pairs = [
                naive_head(core, kind, layer, h, q[h], k[h], v[h], own[:, h], states[layer][h]) for h in range(heads)
            ]
            y = output @ torch.cat([o * silu(gate[h]) for h, (o, _) in enumerate(pairs)])
            states[layer] = torch.stack([s for _, s in pairs])
        outputs.append(y)
    return torch.stack(outputs), torch.stack(states).flatten()


def packed(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences, the longest first, by step, and the number of them at each step."""
    steps = range(len(sequences[0]))
    rows = [[s[t] for s in sequences if t < len(s)] for t in steps]
    return torch.stack([x for step in rows for x in step]), torch.tensor([len(step) for step in rows])


def compare(kind: Any, lengths: list[int], heads: int, layers: int, execution: Any, parts: int, seed: int) -> None:
    torch.manual_seed(seed)
    config = CoreConfig(kind=kind, hidden_size=SIZE, num_heads=heads, num_layers=layers, execution=execution)
    core = CORES[kind](WIDTH, config)
    inputs = [torch.randn(n, WIDTH, requires_grad=True) for n in sorted(lengths, reverse=True)]
    state = torch.randn(len(lengths), core.state_size, requires_grad=True)
    x, sequences_per_step = packed(inputs)
    edges = [WIDTH * part // parts for part in range(parts + 1)]
    columns = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    y, after = core.unroll(
        core.join_inputs([core.project_input(x[:, c], c) for c in columns]), state, sequences_per_step
    )
    singly = [naive(core, kind, config, xs, s) for xs, s in zip(inputs, state, strict=True)]
    want, want_after = packed([outputs for outputs, _ in singly])[0], torch.stack([s for _, s in singly])
    tolerance: Any = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, want, **tolerance)
    torch.testing.assert_close(after, want_after, **tolerance)
    weights = [torch.randn_like(y), torch.randn_like(after)]
    by = [*inputs, state, *core.parameters()]
    ours, theirs = (
        torch.autograd.grad((a * weights[0]).sum() + (b * weights[1]).sum(), by)
        for a, b in ((y, after), (want, want_after))
    )
    for own, expected in zip(ours, theirs, strict=True):
        scale = expected.abs().max().clamp(min=1e-30)
        torch.testing.assert_close(own / scale, expected / scale, **tolerance)


@pytest.fixture(autouse=True)
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("execution", ["packed", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_several_lengths_equal_the_recurrence(kind: str, execution: str) -> None:
    """Chunks are of 32 steps."""
    compare(kind, [70, 64, 33, 32, 31, 1], 2, 1, execution, 1, 0)


@settings(max_examples=20)
@given(
    st.sampled_from(KINDS),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3]),
    st.integers(1, 2),
    st.sampled_from(["packed", "padded"]),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_of_any_lengths_heads_and_layers(
    kind: str, lengths: list[int], heads: int, layers: int, execution: str, parts: int, seed: int
) -> None:
    compare(kind, lengths, heads, layers, execution, parts, seed)
