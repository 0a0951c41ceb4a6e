"""Linear recurrences over packed sequences, and the cores made of them: equal to loops written from the papers."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ppo_tbptt.config import CoreConfig
from ppo_tbptt.models.cores import CORES
from ppo_tbptt.models.cores.scan import scan

EXACT: Any = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda lengths: sorted(lengths, reverse=True))


def packing(lengths: list[int]) -> list[int]:
    return [sum(length > t for length in lengths) for t in range(lengths[0])]


def packed(sequences: list[list[Tensor]]) -> Tensor:
    """All first steps, then all second steps, and so on."""
    return torch.stack([s[t] for t in range(len(sequences[0])) for s in sequences if t < len(s)])


def unpacked(x: Tensor, lengths: list[int]) -> list[list[Tensor]]:
    """The steps of each sequence."""
    rows = iter(x)
    sequences: list[list[Tensor]] = [[] for _ in lengths]
    for count in packing(lengths):
        for sequence in sequences[:count]:
            sequence.append(next(rows))
    return sequences


def assert_equal_with_gradients(own: list[Tensor], naive: list[Tensor], leaves: list[Tensor]) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in naive]
    gradients = []
    for outputs in (own, naive):
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        gradients.append(torch.autograd.grad(torch.as_tensor(loss), leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(own, naive, **EXACT)
    torch.testing.assert_close(gradients[0], gradients[1], **EXACT)


@given(LENGTHS, st.sampled_from(["each step", "all steps", "complex"]), st.booleans())
def test_the_scan_is_a_loop_over_each_sequence(lengths: list[int], factors: str, padded: bool) -> None:
    """Also of factors and states that are negative or zero, and of factors above 1."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), 4) if factors == "each step" else (4,), (sum(lengths), 4), (len(lengths), 4), (2,)]
    a, b, state, v = leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    a[..., 0] = 0
    state[::2] = 0
    for leaf in leaves:
        leaf.requires_grad_()
    if factors == "complex":
        own = scan(torch.cat((a[:2], a[:2])), b, state, packing(lengths), torch.cat((-v, v)), padded=padded)
    else:
        own = scan(a, b, state, packing(lengths), padded=padded)

    sequences: list[list[Tensor]] = []
    for h, a_of, b_of in zip(state, unpacked(a.expand(b.shape), lengths), unpacked(b, lengths), strict=True):
        sequences.append([])
        for a_t, b_t in zip(a_of, b_of, strict=True):
            if factors == "complex":
                z = torch.complex(a_t[:2], v) * torch.complex(*h.chunk(2))
                h = torch.cat((z.real, z.imag)) + b_t
            else:
                h = a_t * h + b_t
            sequences[-1].append(h)
    assert_equal_with_gradients([own], [packed(sequences)], leaves)


def mingru(layer: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Feng et al. 2024, section 3.1.3."""
    (w_z, w_h), (b_z, b_h) = layer.weight.chunk(2), layer.bias.chunk(2)
    z = torch.sigmoid(w_z @ x + b_z)
    h = (1 - z) * h + z * (w_h @ x + b_h)
    return h, h


def lru(layer: Any, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Orvieto et al. 2023, section 3.4, and a gated linear unit."""
    size = len(layer.nu)
    h, c = torch.complex(*state.chunk(2)), torch.complex(*layer.c.chunk(2, 1))
    b = torch.complex(*layer.weight[: 2 * size].chunk(2))
    lambda_ = torch.exp(torch.complex(-layer.nu.exp(), layer.theta.exp()))
    h = lambda_ * h + layer.gamma.exp() * (b @ x.to(b.dtype))
    # C's columns are its real and its negated imaginary part, so that a real product is Re(C h).
    y = (c.conj() @ h).real + layer.weight[2 * size :] @ x
    linear, gate = (layer.out.weight @ y + layer.out.bias).chunk(2)
    return linear * torch.sigmoid(gate), torch.cat((h.real, h.imag))


CELLS: dict[str, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"mingru": mingru, "lru": lru}


def built(kind: Any, **options: Any) -> Any:
    """A core in float64 whose biases are not zero, as they are at first."""
    torch.manual_seed(0)
    core = CORES[kind](6, CoreConfig(kind=kind, **{"hidden_size": 5, **options})).double()
    for name, parameter in core.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return core


@given(st.sampled_from([*CELLS]), LENGTHS, st.integers(1, 3), st.sampled_from(["packed", "padded"]), st.integers(1, 3))
def test_a_core_is_a_loop_of_the_papers_equations(
    kind: str, lengths: list[int], num_layers: int, execution: str, parts: int
) -> None:
    """Outputs, last states, and gradients by inputs, states and weights, with inputs in ``parts``."""
    core = built(kind, num_layers=num_layers, execution=execution)
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    state = torch.randn(len(lengths), core.state_size, dtype=torch.float64, requires_grad=True)
    edges = [6 * part // parts for part in range(parts + 1)]
    pieces = [core.project_input(x[:, i:j], slice(i, j)) for i, j in itertools.pairwise(edges)]
    own = core.unroll(core.join_inputs(pieces), state, torch.tensor(packing(lengths)))

    outputs, last = [], []
    for inputs, before in zip(unpacked(x, lengths), state, strict=True):
        states, ys = list(before.chunk(num_layers)), []
        for y in inputs:
            for number, layer in enumerate(core.layers):
                y, states[number] = CELLS[kind](layer, y, states[number])
            ys.append(y)
        outputs.append(ys)
        last.append(torch.cat(states))
    assert_equal_with_gradients(list(own), [packed(outputs), torch.stack(last)], [x, state, *core.parameters()])


@pytest.mark.parametrize("kind", CELLS)
def test_autocast_leaves_the_recurrence_in_float32(kind: Any) -> None:
    """From inputs that are float32, as the agent's are, states are the same bits with it and without."""
    core = CORES[kind](6, CoreConfig(kind=kind, hidden_size=5))
    p = core.project_input(torch.randn(60, 6), slice(0, 6))
    state = core.initial_state(2)
    with torch.no_grad():
        wanted = core.unroll(p, state, torch.tensor([2] * 30))[1]
        with torch.autocast("cpu", torch.bfloat16):
            narrow = core.project_input(torch.randn(60, 6), slice(0, 6))
            assert narrow.dtype == torch.bfloat16
            assert core.unroll(narrow, state, torch.tensor([2] * 30))[1].dtype == torch.float32
            assert torch.equal(core.unroll(p, state, torch.tensor([2] * 30))[1], wanted)


def test_the_gates_of_a_mingru_are_what_it_overwrites_its_state_by() -> None:
    core = built("mingru", num_layers=2)
    x, state = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    gates = core.gates(core.project_input(x, slice(0, 6)), state)
    first = torch.stack([mingru(core.layers[0], *pair)[0] for pair in zip(x, state[:, :5], strict=True)])
    for gate, layer, inputs in zip(gates, core.layers, (x, first), strict=True):
        torch.testing.assert_close(gate[:, 0], torch.sigmoid(inputs @ layer.weight[:5].T + layer.bias[:5]), **EXACT)
    core = built("lru")
    assert core.gates(core.project_input(x, slice(0, 6)), state) == []


def test_an_lru_begins_on_its_ring_and_its_state_is_as_large_as_what_it_adds_up() -> None:
    torch.manual_seed(0)
    core: Any = CORES["lru"](16, CoreConfig(kind="lru", hidden_size=200)).requires_grad_(False)
    (layer,) = core.layers
    radius, angle = (-layer.nu.exp()).exp(), layer.theta.exp()
    assert 0.9 <= radius.min() < 0.91 and 0.99 < radius.max() <= 0.999
    assert 0 < angle.min() < 0.01 and 0.3 < angle.max() <= math.pi / 10
    p = core.project_input(torch.randn(10 * 1500, 16), slice(0, 16))
    _, state = core.unroll(p, core.initial_state(10), torch.full((1500,), 10))
    assert float(state.square().mean() / p[:, :400].square().mean()) == pytest.approx(1, abs=0.2)
