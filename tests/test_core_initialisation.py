"""What cores begin with: the identity, and biases of the gates that keep memory."""

from typing import Any

import pytest
import torch
from helpers import run_core
from torch import Tensor

from ppo_tbptt.config import CoreConfig, describe_fields
from ppo_tbptt.models import CORES, Core


def build(kind: Any, size: int = 8, **options: Any) -> Core:
    torch.manual_seed(0)
    return CORES[kind](6, CoreConfig(kind=kind, hidden_size=size, num_layers=2, **options))


def idle_gates(core: Core, size: int) -> list[Tensor]:
    """Of each layer ``[gate, H]``, with nothing to see and nothing in memory: what the biases alone make of them."""
    x = core.join_inputs([core.project_input(torch.zeros(1, 6), slice(0, 6))])
    gates = core.gates(x, core.initial_state(1))
    # The second layer sees the output of the first, which is 0: there is nothing in memory.
    assert all(g.shape[-1] == size for g in gates) and len(gates) == 2
    return [g[0] for g in gates]


def test_an_irnn_begins_as_the_identity_and_keeps_what_it_has() -> None:
    core: Any = build("irnn", 64)
    for layer in range(2):
        assert torch.equal(getattr(core.rnn, f"weight_hh_l{layer}"), torch.eye(64))
    state = torch.rand(3, 128)
    y, after = run_core(core, torch.zeros(50, 3, 6), state)
    torch.testing.assert_close(after[:, :64], state[:, :64], rtol=0, atol=0)
    assert torch.equal(y[-1], after[:, 64:])
    inputs = core.rnn.weight_ih_l1  # 4,096 of them, so their deviation has an error of 1.1 %
    assert inputs.std().item() == pytest.approx(0.001, rel=0.05) and abs(inputs.mean().item()) < 1e-4
    assert core.rnn.weight_ih_l0.abs().max() < 0.006


@pytest.mark.parametrize("kind", ["lstm", "ln_lstm"])
def test_forget_bias_is_that_of_the_forget_gates_alone_and_draws_nothing(kind: str) -> None:
    plain = build(kind).state_dict()
    after_plain = torch.rand(())
    core = build(kind, forget_bias=1.5)
    assert torch.equal(torch.rand(()), after_plain)
    for name, x in core.state_dict().items():
        assert torch.equal(x, plain[name]) or "bias_hh" in name
    for i, f, o in idle_gates(core, 8):
        torch.testing.assert_close(f, torch.tensor(1.5).sigmoid().expand(8))
        assert (i == 0.5).all() and (o == 0.5).all()
    assert all((gates == 0.5).all() for gates in idle_gates(build(kind), 8))


@pytest.mark.parametrize("kind", ["gru", "lstm", "ln_gru", "ln_lstm"])
def test_chrono_initialisation_makes_units_forget_after_up_to_so_many_steps(kind: str) -> None:
    """What is kept of a state after k idle steps is keep^k: a time of 1 / (1 - keep) = 1 + u, u from 1 to T_max - 1."""
    layers = idle_gates(build(kind, 512, chrono_steps=100), 512)
    for gates in layers:
        keep = gates[1]
        time = 1 / (1 - keep)
        assert 2 <= time.min() < 4 and 98 < time.max() <= 100.01
        assert time.mean().item() == pytest.approx(51, abs=4)  # 3 standard errors
        if "lstm" in kind:
            torch.testing.assert_close(gates[0], 1 - keep)
            assert (gates[2] == 0.5).all()
        else:
            assert (gates[0] == 0.5).all()
    assert not torch.equal(*layers)


def test_a_chrono_initialised_gru_keeps_its_state() -> None:
    """Not what it sees: the gate that is 1 keeps in torch's GRU, and replaces in the paper's."""
    core, plain = (build("gru", 64, **options) for options in ({"chrono_steps": 1000}, {}))
    state = torch.randn(4, 128)
    kept, lost = (run_core(x, torch.zeros(10, 4, 6), state)[1] - state for x in (core, plain))
    assert kept[:, :64].norm() < 0.2 * lost[:, :64].norm()


def test_every_core_is_explained() -> None:
    (row,) = (row for row in describe_fields() if row.key == "core.kind")
    for kind in CORES:
        assert f'"{kind}"' in row.type
        assert kind in row.help.replace(":", "").replace(",", "").split()
