"""Matrix memories equal their papers' recurrences, one step of one sequence at a time."""

import itertools
from typing import Any

import pytest
import torch
from configs_for_tests import base, error_of, tiny
from helpers import timeless
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_training import matrix_memory
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ppo_tbptt.config import Config, CoreConfig
from ppo_tbptt.models import CORES
from ppo_tbptt.training.trainer import Trainer

KINDS = ["retention", "gated_delta"]
WIDTH, SIZE = 5, 6


def naive(core: Any, config: CoreConfig, xs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence ``[L, WIDTH]``: the outputs and the state after the last step."""
    states, outputs = list(state.view(config.num_layers, -1)), []
    for x in xs:
        for layer in range(config.num_layers):
            x, states[layer] = matrix_memory(core, config, layer, x, states[layer])
        outputs.append(x)
    return torch.stack(outputs), torch.cat(states)


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
    columns = [slice(a, b) for a, b in itertools.pairwise(edges)]
    y, after = core.unroll(
        core.join_inputs([core.project_input(x[:, c], c) for c in columns]), state, sequences_per_step
    )
    singly = [naive(core, config, xs, s) for xs, s in zip(inputs, state, strict=True)]
    want, want_after = packed([outputs for outputs, _ in singly])[0], torch.stack([s for _, s in singly])
    tolerance: Any = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, want, **tolerance)
    torch.testing.assert_close(after, want_after, **tolerance)
    acting, acted = state[:1], []
    with torch.no_grad():
        for row in inputs[0]:
            out, acting = core(core.project_input(row[None], slice(0, WIDTH))[None], acting)
            acted.append(out[0, 0])
    torch.testing.assert_close((torch.stack(acted), acting[0]), singly[0], **tolerance)
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
    """Chunks are of 16 steps."""
    compare(kind, [40, 33, 32, 31, 16, 15, 1], 2, 1, execution, 1, 0)


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


def test_a_head_that_forgets_everything_at_once_is_forgotten_with_gradients() -> None:
    """A decay of exp(-1000) is 0 in any arithmetic; products of decays may not be divided by it."""
    config = CoreConfig(kind="gated_delta", hidden_size=SIZE, num_heads=2)
    core = CORES["gated_delta"](WIDTH, config)
    torch.nn.init.constant_(core.get_parameter("step_bias"), 1000.0)
    x = core.project_input(torch.randn(40, WIDTH), slice(0, WIDTH))
    before = torch.randn(1, core.state_size, requires_grad=True)
    y, after = core(x[:, None], before)
    fresh, _ = core(x[-1:, None], torch.zeros_like(before))
    torch.testing.assert_close(y[-1:], fresh)
    gradients = torch.autograd.grad(y.sum() + after.sum(), [before, *core.parameters()])
    assert not gradients[0].any() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_memory_holds_is_computed_in_float32_where_the_arithmetic_is_bfloat16(kind: Any) -> None:
    torch.set_default_dtype(torch.float32)
    core = CORES[kind](WIDTH, CoreConfig(kind=kind, hidden_size=SIZE, num_heads=2))
    x, before = core.project_input(torch.randn(40, WIDTH), slice(0, WIDTH))[:, None], torch.randn(1, core.state_size)
    for steps in (1, 40):
        expected = core(x[:steps], before)[1]
        with torch.autocast("cpu", torch.bfloat16):
            y, state = core(x[:steps], before)
        assert torch.equal(state, expected) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_padded_execution_computes_what_packed_leaves_out(kind: Any) -> None:
    flops = []
    for execution in ("packed", "padded"):
        core = CORES[kind](WIDTH, CoreConfig(kind=kind, hidden_size=SIZE, num_heads=2, execution=execution))
        x = core.project_input(torch.randn(67, WIDTH), slice(0, WIDTH))
        with FlopCounterMode(display=False) as counter:
            core.unroll(x, core.initial_state(4), torch.tensor([4] + [1] * 63))
        flops.append(counter.get_total_flops())
    assert flops[1] > 1.5 * flops[0]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_must_divide_the_size(kind: str) -> None:
    message = error_of(Config.from_dict, base(core={"kind": kind, "hidden_size": 30}))
    assert all(word in message for word in ("core.num_heads: ", "4 heads of hidden_size = 30", kind, "must divide it"))
    Config.from_dict(base(core={"kind": "gru", "hidden_size": 30}))


CUTTING = {"rollout_steps": 16, "sequence_length": 8, "sequence_stride": 4, "burn_in": 4, "refresh_every": 1}


def test_states_are_stored_only_where_sequences_can_begin_and_trainings_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beginnings of episodes share a row, and there are four more of 16 steps; one row is for what is not kept."""
    config = tiny(
        total_steps=128,
        core={"kind": "gated_delta", "initial_state": "learnt", "norm": True},
        ppo={**CUTTING, "num_epochs": 2},
        train={"instruments_every": 2},
    )
    trainings = []
    for wide in (True, False):
        monkeypatch.setattr(CORES["gated_delta"], "wide_state", wide)
        with Trainer(config) as trainer:
            trainings.append([timeless(report.row()) for report in trainer])
            assert len(trainer.storage.state.rows) == (6 if wide else 16) and trainer.storage.start[1:].any()
    of_stored = ("memory/state_norm", "memory/state_drift")  # of fewer states
    others = [
        [{tag: x for tag, x in row.items() if not tag.startswith(of_stored)} for row in rows] for rows in trainings
    ]
    assert others[0] == others[1]
    ours, theirs = ([rows[1][tag] for tag in of_stored] for rows in trainings)
    assert ours == pytest.approx(theirs, rel=0.5) and ours != theirs


def test_instruments_see_the_decay_and_the_strength_of_each_head_and_layer() -> None:
    config = CoreConfig(kind="gated_delta", hidden_size=SIZE, num_heads=2, num_layers=2)
    core = CORES["gated_delta"](WIDTH, config)
    x, state = core.project_input(torch.randn(3, WIDTH), slice(0, WIDTH)), torch.randn(3, core.state_size)
    first, second = core.gates(x, state)
    rate, bias = core.get_parameter("log_rate")[0].exp(), core.get_parameter("step_bias")[0]
    torch.testing.assert_close(first[:, 0], (1 + (x[:, -4:-2] + bias).exp()) ** -rate)
    torch.testing.assert_close(first[:, 1], 1 / (1 + (-x[:, -2:]).exp()))
    changed = core.gates(x, torch.zeros_like(state))
    assert torch.equal(changed[0], first) and not (changed[1] == second).any()
    assert CORES["retention"](WIDTH, CoreConfig(kind="retention", hidden_size=SIZE, num_heads=2)).gates(x, state) == []
