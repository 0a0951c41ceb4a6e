"""bfloat16 arithmetic: what stays float32, and how far it may be off."""

import pytest
import torch
from helpers import fake_rollout, small_agent, starts, worst_replay

from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.ppo.sequences import cut
from ppo_tbptt.runtime.device import resolve_precision, storage_device

# bfloat16 keeps 8 significant bits: a relative error of 2**-9 at each of a handful of roundings, here on logits and
# values of size 1 to 3. Acting and learning batch differently, so their roundings differ by that much.
TOLERANCE = 0.05


def test_auto_depends_on_the_kind_of_device_alone() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
    assert resolve_precision("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_precision("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("core", CORES)
def test_replay_in_bfloat16(core: str) -> None:
    agent = small_agent(core, 2)
    agent.precision = torch.bfloat16
    rollout, sequences = fake_rollout(agent, starts()), cut(starts(), 8)
    assert max(worst_replay(agent, rollout, sequences)) < TOLERANCE
    agent.precision = torch.float32
    assert max(worst_replay(agent, rollout, sequences)) > 1e-4  # it really was bfloat16


def test_state_outputs_and_gradients_are_float32() -> None:
    agent = small_agent("gru")
    agent.precision = torch.bfloat16
    output = agent.step({"obs": torch.randn(3, 5)}, agent.core.initial_state(3))
    assert output.logits.dtype == output.value.dtype == output.state_out.dtype == torch.float32
    output.value.sum().backward()
    assert {p.grad.dtype for p in agent.parameters() if p.grad is not None} == {torch.float32}


def test_gradients_point_the_same_way() -> None:
    """On the published network, where the gradients differed by 1 %: each rounding is off by up to 2**-9."""
    torch.manual_seed(0)
    agent = Agent({"obs": (84, 84, 3)}, (4,))
    obs = {"obs": torch.randint(0, 256, (64, 84, 84, 3), dtype=torch.uint8)}
    state, packing = torch.randn(4, 512) / 2, torch.full((16,), 4)
    gradients = []
    for precision in (torch.float32, torch.bfloat16):
        agent.precision = precision
        agent.zero_grad()
        output = agent.unroll(obs, state, packing)
        (output.logits.log_softmax(1)[:, 0].mean() + (output.value - 1).square().mean()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.999


def test_observations_stay_on_the_device_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 4000))
    assert storage_device("auto", 500, cuda) == cuda
    assert storage_device("auto", 501, cuda) == cpu
    assert storage_device("device", 10**9, cuda) == cuda
    assert storage_device("host", 1, cuda) == cpu
    assert storage_device("host", 1, cpu) == cpu
