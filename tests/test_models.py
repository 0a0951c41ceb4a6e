"""Networks: the contract of cores, the published baseline's shapes, sampling."""

import math

import pytest
import torch
from published_network import convert_published
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.models import CORES, Agent, Core
from ppo_tbptt.models.encoders import NatureCNN
from ppo_tbptt.models.heads import log_prob_and_entropy, mode, sample


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", CORES)
def test_core_contract(kind: str, num_layers: int) -> None:
    """A new entry in the table is picked up here."""
    torch.manual_seed(0)
    core = CORES[kind](6, 8, num_layers, 0.0)
    x = torch.randn(5, 3, 6)
    state = torch.randn(3, core.state_size)
    y, after = core(x, state)
    assert y.shape == (5, 3, core.output_size)
    assert after.shape == state.shape
    assert core.initial_state(4).shape == (4, core.state_size)
    stepped = []
    for t in range(5):  # L = 1 is the same code path
        out, state = core(x[t : t + 1], state)
        stepped.append(out)
    torch.testing.assert_close(torch.cat(stepped), y)
    torch.testing.assert_close(state, after)
    if core.state_size:  # rows don't mix
        other = core(x[:, :1], core.initial_state(1))[0]
        both = core(x, core.initial_state(3))[0]
        torch.testing.assert_close(both[:, :1], other)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kind", CORES)
def test_packed_equals_padded(kind: str, num_layers: int) -> None:
    """A core's own way with packed sequences gives what padding gives, outputs and gradients."""
    torch.manual_seed(0)
    core = CORES[kind](6, 8, num_layers, 0.0)
    batch_sizes = torch.tensor([4, 4, 2, 1, 1])
    state = torch.randn(4, core.state_size)
    results = []
    for unroll in (core.unroll, lambda *args: Core.unroll(core, *args)):
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = unroll(x, state, batch_sizes)
        results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)  # relu lets numbers grow to 10 and more


def test_state_layout_is_that_of_torch() -> None:
    torch.manual_seed(0)
    core = CORES["lstm"](6, 8, 2, 0.0)
    assert core.state_size == 2 * 2 * 8
    h, c = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    flat = torch.cat([h[0], h[1], c[0], c[1]], 1)
    x = torch.randn(4, 3, 6)
    y, after = core(x, flat)
    want, (h, c) = core.rnn(x, (h, c))  # type: ignore[operator]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(after, torch.cat([h[0], h[1], c[0], c[1]], 1))


def test_dropout_acts_between_layers_in_training_only() -> None:
    torch.manual_seed(0)
    core = CORES["gru"](6, 8, 2, 0.5)
    x, state = torch.randn(5, 3, 6), core.initial_state(3)
    core.eval()
    assert torch.equal(core(x, state)[0], core(x, state)[0])
    core.train()
    assert not torch.equal(core(x, state)[0], core(x, state)[0])


def test_cnn_output_and_division_by_255() -> None:
    torch.manual_seed(0)
    cnn = NatureCNN((84, 84, 3), (32, 64, 64))
    assert cnn.output_size == 3136
    frames = torch.randint(0, 256, (2, 84, 84, 3), dtype=torch.uint8)
    x = frames.permute(0, 3, 1, 2).float() / 255
    plain = cnn.rest(cnn.first(x)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(cnn(frames), plain, atol=1e-5, rtol=1e-5)
    assert NatureCNN((84, 84, 3), (4, 4, 4), 20)(frames).shape == (2, 20)
    with pytest.raises(ValueError, match="at least 36x36"):
        NatureCNN((30, 84, 3), (4, 4, 4))


def test_published_sizes() -> None:
    agent = Agent({"obs": (84, 84, 3)}, (4,))
    convolutions = (3 * 64 * 32 + 32) + (32 * 16 * 64 + 64) + (64 * 9 * 64 + 64)
    gru = 3 * (512 * (3136 + 512) + 2 * 512)
    heads = 3 * (512 * 512 + 512) + (512 * 4 + 4) + (512 + 1)
    assert sum(p.numel() for p in agent.parameters()) == convolutions + gru + heads == 6_472_869
    assert agent.core.state_size == 512


class PublishedModel(nn.Module):
    """The published baseline's layers under its names: frames are channels-first, features in (channel, x, y) order."""

    def __init__(self, nvec: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 32, 8, 4), nn.Conv2d(32, 64, 4, 2), nn.Conv2d(64, 64, 3, 1)
        self.recurrent_layer = nn.GRU(3136, 512, batch_first=True)
        self.lin_hidden, self.lin_policy, self.lin_value = (nn.Linear(512, 512) for _ in range(3))
        self.policy_branches = nn.ModuleList(nn.Linear(512, n) for n in nvec)
        self.value = nn.Linear(512, 1)

    def forward(self, frames: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(frames))))))
        y, state = self.recurrent_layer(x.flatten(1)[:, None], state[None])
        h = F.relu(self.lin_hidden(y[:, 0]))
        policy = F.relu(self.lin_policy(h))
        logits = torch.cat([branch(policy) for branch in self.policy_branches], 1)
        return logits, self.value(F.relu(self.lin_value(h)))[:, 0], state[0]


def test_published_weights_give_equal_logits() -> None:
    torch.manual_seed(0)
    theirs = PublishedModel((3, 3))
    agent = Agent({"obs": (84, 84, 3)}, (3, 3))
    agent.load_state_dict(convert_published(theirs.state_dict()))
    frames = torch.randint(0, 256, (4, 84, 84, 3), dtype=torch.uint8)
    state = torch.randn(4, 512)
    with torch.no_grad():
        logits, value, after = agent.step({"obs": frames}, state)
        want = theirs(frames.permute(0, 3, 1, 2).float() / 255, state)
    torch.testing.assert_close(logits, want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(value, want[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(after, want[2], atol=1e-5, rtol=1e-4)
    state_dict = theirs.state_dict()
    del state_dict["lin_value.bias"]
    with pytest.raises(ValueError, match=r"lin_value\.bias"):
        convert_published(state_dict)


def test_initialisation() -> None:
    torch.manual_seed(0)
    agent = Agent({"obs": (84, 84, 3)}, (4,), core_hidden_size=64, hidden_size=32)
    weight = agent.heads.hidden.weight  # 32 x 64: rows are orthogonal with norm sqrt(2)
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(32), atol=1e-4, rtol=0)
    branch = agent.heads.get_parameter("policy.0.weight")
    torch.testing.assert_close(branch @ branch.T, 0.01 * torch.eye(4), atol=1e-5, rtol=0)
    heads = agent.heads
    for layer, gain in [(heads.policy_hidden, 2**0.5), (heads.value_hidden, 2**0.5), (heads.value, 1.0)]:
        rows = layer.weight @ layer.weight.T
        torch.testing.assert_close(rows, gain**2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
    for name, weight in agent.core.named_parameters():
        if "weight" in name:  # 192 x 3136 and 192 x 64: the fewer of rows and columns are orthogonal
            rows = weight @ weight.T if len(weight) < weight.shape[1] else weight.T @ weight
            torch.testing.assert_close(rows, 2 * torch.eye(len(rows)), atol=1e-3, rtol=0)
    assert all(not p.any() for name, p in agent.core.named_parameters() if "bias" in name)


def test_the_two_kinds_of_plain_rnn_differ_in_their_nonlinearity() -> None:
    torch.manual_seed(0)
    x = 10 * torch.randn(3, 7, 5)
    outputs = {}
    for kind in ("rnn_tanh", "rnn_relu"):
        core = CORES[kind](5, 8, 1, 0.0)
        outputs[kind] = core(x, core.initial_state(7))[0]
    assert outputs["rnn_tanh"].min() < 0 and outputs["rnn_tanh"].abs().max() <= 1
    assert outputs["rnn_relu"].min() == 0 and outputs["rnn_relu"].max() > 1


def test_without_memory_the_core_has_nothing_to_save() -> None:
    agent = Agent({"obs": (3,)}, (2,), core="none", hidden_size=8, vector_hidden_sizes=(8,))
    assert not [name for name in agent.state_dict() if name.startswith("core")]


def test_sampling_follows_the_probabilities() -> None:
    logits = torch.tensor([[math.log(0.1), math.log(0.2), math.log(0.7), 0.0, 0.0]]).expand(20_000, -1)
    noise = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0))
    action, log_prob = sample(logits, noise, (3, 2))
    shares = torch.bincount(action[:, 0], minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.01, rtol=0)  # 3 standard errors
    torch.testing.assert_close(action[:, 1].float().mean(), torch.tensor(0.5), atol=0.011, rtol=0)
    recomputed, entropy = log_prob_and_entropy(logits, action, (3, 2))
    torch.testing.assert_close(log_prob, recomputed)
    expected = -sum(p * math.log(p) for p in (0.1, 0.2, 0.7, 0.5, 0.5))
    torch.testing.assert_close(entropy[0], torch.tensor(expected))
    assert mode(logits[:1], (3, 2)).tolist() == [[2, 0]]


def test_sampling_at_the_edges_of_the_noise() -> None:
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]])
    largest = torch.tensor([[1 - 2**-24]])
    assert sample(logits, torch.zeros(1, 1), (4,))[0].item() == 1  # never an action of probability 0
    assert sample(logits, largest, (4,))[0].item() == 2
