"""Networks: the contract of cores, the published baseline's shapes, sampling."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import run_core, tiny_agent
from published_network import convert_published
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from ppo_tbptt.config import ConfigError, CoreConfig, ModelConfig
from ppo_tbptt.models import CORES, Agent, Core
from ppo_tbptt.models.contract import check_core
from ppo_tbptt.models.cores import GRU, LSTM, Normalized, Residual
from ppo_tbptt.models.encoders import CNN
from ppo_tbptt.models.heads import log_prob_and_entropy, mode, sample


def core_config(kind: str, num_layers: int = 1, dropout: float = 0.0) -> CoreConfig:
    return CoreConfig(kind=kind, hidden_size=8, num_layers=num_layers, dropout=dropout)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_layers", "dropout"), [(1, 0.0), (2, 0.0), (2, 0.5)])
@pytest.mark.parametrize("kind", CORES)
def test_builtin_cores_keep_the_contract(kind: str, num_layers: int, dropout: float) -> None:
    check_core(CORES[kind], core_config(kind, num_layers, dropout))


class NormalizedWithShortcut(Residual):
    def __init__(self, input_size: int, config: CoreConfig) -> None:
        super().__init__(Normalized(CORES[config.kind](input_size, config)), input_size)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm", "ln_lstm"])
def test_a_norm_and_a_shortcut_around_a_core_keep_the_contract(kind: str) -> None:
    check_core(NormalizedWithShortcut, core_config(kind, 2))


@pytest.mark.parametrize("norm", [False, True])
def test_a_shortcut_adds_the_projected_features_to_the_cores_output(norm: bool) -> None:
    config = CoreConfig(kind="gru", hidden_size=8, residual=True, norm=norm)
    agent = Agent({"image": (36, 36, 1), "vector": (5,)}, (3,), core=config, model=ModelConfig(hidden_size=16))
    obs = {"image": torch.randint(0, 256, (6, 36, 36, 1), dtype=torch.uint8), "vector": torch.randn(6, 5)}
    state, packing = torch.randn(3, 8), torch.tensor([3, 2, 1])
    core = agent.core
    assert isinstance(core, Residual) and isinstance(core.core, Normalized if norm else GRU)
    gru = core.core.core if isinstance(core.core, Normalized) else core.core
    assert isinstance(gru, GRU)
    torch.nn.init.normal_(core.shortcut.bias)  # zero at first, it could be added once for each observation
    output = agent.unroll(obs, state, packing)
    assert output.features is not None
    own = gru.rnn(PackedSequence(output.features, packing), state[None])[0].data
    if norm:
        own = (own - own.mean(1, keepdim=True)) / (own.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = own + core.shortcut(output.features)
    torch.testing.assert_close(output.core_output, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.value, agent.heads(expected)[1], atol=1e-5, rtol=1e-5)


class Stretches(LSTM):
    """A core that leaves the unrolling of packed sequences to :class:`Core`."""

    unroll = Core.unroll


class Leaky(Core):
    """The least there is to a core; one without weights, too."""

    def __init__(self, input_size: int, config: Any) -> None:
        super().__init__()
        self.state_size = self.output_size = input_size

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for x_t in x:
            state = 0.9 * state + x_t
            outputs.append(state)
        return torch.stack(outputs), state


@pytest.mark.parametrize("core_class", [Stretches, Leaky])
def test_cores_with_nothing_but_forward_keep_the_contract(core_class: Any) -> None:
    check_core(core_class, core_config("lstm", 2, 0.5))


@pytest.mark.parametrize("lengths", [[3], [2, 2], [3, 3, 1], [4, 2, 2, 1]])
def test_packed_sequences_are_unrolled_each_for_itself(lengths: list[int]) -> None:
    core, state = Leaky(2, None), torch.randn(len(lengths), 2)
    sequences = [torch.randn(length, 2) for length in lengths]
    x = torch.cat([torch.stack([s[t] for s in sequences if t < len(s)]) for t in range(lengths[0])])
    packing = torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])
    y, after = core.unroll(x, state, packing)
    singly = [core(s[:, None], before[None]) for s, before in zip(sequences, state, strict=True)]
    wanted = torch.cat([torch.cat([y[t] for y, _ in singly if t < len(y)]) for t in range(lengths[0])])
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(after, torch.cat([last for _, last in singly]))


class StateBefore(Leaky):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = super().forward(x, state)
        return y, state if len(x) == 1 else y[-2]


class WrongShape(Leaky):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x, state)[0], state[None]


class MixedRows(Leaky):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x - x.mean(1, keepdim=True), state)


class InPlace(Leaky):
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, last = super().forward(x, state)
        return y, state.copy_(last)


class Forgetful(Leaky):
    def unroll(self, x: Tensor, state: Tensor, sequences_per_step: Tensor) -> tuple[Tensor, Tensor]:
        return super().unroll(x, torch.zeros_like(state), sequences_per_step)


class StateOfPadding(Leaky):
    def unroll(self, x: Tensor, state: Tensor, sequences_per_step: Tensor) -> tuple[Tensor, Tensor]:
        y, last = super().unroll(x, state, sequences_per_step)
        return y, 0.9 * last


class Detached(Leaky):
    def unroll(self, x: Tensor, state: Tensor, sequences_per_step: Tensor) -> tuple[Tensor, Tensor]:
        y, last = super().unroll(x.detach(), state, sequences_per_step)
        return y + x - x.detach(), last


@pytest.mark.parametrize(
    ("core_class", "complaint"),
    [
        (WrongShape, r"must be \[B, state_size\]"),
        (StateBefore, "L steps in one call"),
        (MixedRows, "must not depend on the other rows"),
        (InPlace, "must not be changed in place"),
        (Forgetful, "must recompute the outputs of acting"),
        (StateOfPadding, "after the last step of each sequence"),
        (Detached, "gradients of unroll"),
    ],
)
def test_the_contract_sees_what_is_broken(core_class: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=f"^{core_class.__name__}: .*{complaint}"):
        check_core(core_class, None)


def test_state_layout_is_that_of_torch() -> None:
    core = CORES["lstm"](6, core_config("lstm", 2))
    assert core.state_size == 2 * 2 * 8
    h, c = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    flat = torch.cat([h[0], h[1], c[0], c[1]], 1)
    x = torch.randn(4, 3, 6)
    y, state = run_core(core, x, flat)
    want, (h, c) = core.rnn(x, (h, c))  # type: ignore[operator]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(state, torch.cat([h[0], h[1], c[0], c[1]], 1))


def test_dropout_acts_between_layers_in_training_only() -> None:
    core = CORES["gru"](6, core_config("gru", 2, 0.5))
    x, state = torch.randn(5, 3, 6), core.initial_state(3)
    core.eval()
    assert torch.equal(run_core(core, x, state)[0], run_core(core, x, state)[0])
    core.train()
    assert not torch.equal(run_core(core, x, state)[0], run_core(core, x, state)[0])


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("gur", r"'gur' is unknown; must be module:name or built in \(none, rnn_tanh, .*\)"),
        ("no_such_module:Core", "'no_such_module:Core': ModuleNotFoundError: No module named"),
        ("test_models:Nothing", "'test_models:Nothing': AttributeError: .* has no attribute 'Nothing'"),
        ("test_models:PublishedModel", "must be a subclass of ppo_tbptt.models.Core"),
        ("test_models:WrongShape", "has no class Config"),
        ("test_models:Choosy", "TypeError: .* unexpected keyword argument 'colour'"),
        ("test_models:Sizeless", "its state_size is None; must be a whole number from 0 on"),
    ],
)
def test_a_core_that_cannot_be_built_is_one_line(kind: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^core.kind: .*{complaint}") as caught:
        Agent({"obs": (3,)}, (2,), core=SimpleNamespace(kind=kind, residual=False, options={"colour": "red"}))
    assert "\n" not in str(caught.value) and kind in str(caught.value)


class Choosy(Leaky):
    @dataclass
    class Config:
        width: int = 3


class Sizeless(Leaky):
    Config = SimpleNamespace

    def __init__(self, input_size: int, config: Any) -> None:
        Core.__init__(self)
        self.output_size, self.state_size = input_size, None  # type: ignore[assignment]


def test_observations_may_have_any_name() -> None:
    """Ordinary ones name their encoders, as saved weights do."""
    names = ["obs", "type", "keys", "a.b", "a_b", "", "training"]
    agent = tiny_agent(dict.fromkeys(names, (3,)), (2,))
    assert {"encoder.parts.obs.layers.0.weight", "encoder.parts.a_b.layers.0.weight"} <= agent.state_dict().keys()
    tiny_agent(dict.fromkeys(names, (3,)), (2,), seed=1).load_state_dict(agent.state_dict())
    state = agent.core.initial_state(2)
    zero = {name: torch.zeros(2, 3) for name in names}
    packing = torch.tensor([2])
    plain = agent.unroll(zero, state, packing).features
    for position, name in enumerate(names):
        changed = (agent.unroll({**zero, name: torch.randn(2, 3)}, state, packing).features != plain).any(0)
        assert changed.view(len(names), 8).any(1).tolist() == [k == position for k in range(len(names))]


def test_without_layers_a_vector_feeds_the_core_as_it_is() -> None:
    agent = Agent({"image": (36, 36, 1), "vector": (5,)}, (3,), model=ModelConfig(vector_hidden_sizes=()))
    vector = torch.randn(4, 5)
    assert torch.equal(agent.encoder({"vector": vector})["vector"], vector)
    assert agent.encoder.columns["vector"].stop - agent.encoder.columns["vector"].start == 5


def test_cnn_output_and_division_by_255() -> None:
    torch.manual_seed(0)
    cnn = CNN((84, 84, 3), (32, 64, 64))
    assert cnn.output_size == 3136
    frames = torch.randint(0, 256, (2, 84, 84, 3), dtype=torch.uint8)
    x = frames.permute(0, 3, 1, 2).float() / 255
    plain = cnn.rest(cnn.first(x)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(cnn(frames), plain, atol=1e-5, rtol=1e-5)
    assert CNN((84, 84, 3), (4, 4, 4), features=20)(frames).shape == (2, 20)
    with pytest.raises(ValueError, match="at least 36x36"):
        CNN((30, 84, 3), (4, 4, 4))


def test_normalized_frames_have_mean_zero_and_unit_variance_over_those_it_was_fitted_to() -> None:
    torch.manual_seed(0)
    cnn = CNN((36, 36, 2), (4, 4, 4), normalize=True)
    frames = torch.randint(0, 256, (5, 36, 36, 2), dtype=torch.uint8) // torch.tensor([1, 9], dtype=torch.uint8)
    plain = CNN((36, 36, 2), (4, 4, 4))
    plain.load_state_dict({name: x for name, x in cnn.state_dict().items() if name not in ("mean", "std")})
    torch.testing.assert_close(cnn(frames), plain(frames))
    cnn.fit_normalization(frames)
    x = frames.double().numpy()
    x = x - x.mean(0)
    scaled = torch.from_numpy(x / x.std()).float().permute(0, 3, 1, 2)
    expected = cnn.rest(F.conv2d(scaled, cnn.first.weight, cnn.first.bias, 4)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(cnn(frames), expected, atol=1e-4, rtol=1e-4)
    cnn.fit_normalization(frames[:1])  # without any variance
    assert cnn(frames).isfinite().all()


TILED = ModelConfig(cnn_channels=(16, 8), cnn_kernels=(14, 1), cnn_strides=(14, 1))


def test_convolutions_of_other_kernels_and_strides_see_each_tile_alone() -> None:
    torch.manual_seed(0)
    agent = Agent({"obs": (84, 84, 3)}, (4,), model=TILED)
    frames = torch.randint(0, 256, (2, 84, 84, 3), dtype=torch.uint8)
    frames[1] = frames[0]
    frames[1, 14:28, 42:56] = 255 - frames[0, 14:28, 42:56]
    features = agent.encoder({"obs": frames})["obs"].view(2, 6, 6, 8)
    assert (features[0] != features[1]).any(-1).nonzero().tolist() == [[1, 3]]
    with pytest.raises(ValueError, match="at least 14x14"):
        Agent({"obs": (13, 84, 3)}, (4,), model=TILED)


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
        output = agent.step({"obs": frames}, state)
        want = theirs(frames.permute(0, 3, 1, 2).float() / 255, state)
    torch.testing.assert_close(output.logits, want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.value, want[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.state_out, want[2], atol=1e-5, rtol=1e-4)
    state_dict = theirs.state_dict()
    del state_dict["lin_value.bias"]
    with pytest.raises(ValueError, match=r"lin_value\.bias"):
        convert_published(state_dict)


def test_initialisation() -> None:
    torch.manual_seed(0)
    agent = Agent({"obs": (84, 84, 3)}, (4,), core=CoreConfig(hidden_size=64), model=ModelConfig(hidden_size=32))
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
        core = CORES[kind](5, CoreConfig(kind=kind, hidden_size=8))
        outputs[kind] = run_core(core, x, core.initial_state(7))[0]
    assert outputs["rnn_tanh"].min() < 0 and outputs["rnn_tanh"].abs().max() <= 1
    assert outputs["rnn_relu"].min() == 0 and outputs["rnn_relu"].max() > 1


def test_without_memory_the_core_has_nothing_to_save() -> None:
    agent = tiny_agent({"obs": (3,)}, (2,), "none")
    assert not [name for name in agent.state_dict() if name.startswith("core")]
    assert agent.core.state_size == 0


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


def test_sampling_among_many_choices() -> None:
    """As one by one, with memory for no more than a few numbers per choice."""
    logits, noise = torch.randn(64, 3000), torch.rand(64, 1)
    action, _ = sample(logits, noise, (3000,))
    cumulative = logits.double().softmax(1).cumsum(1)
    wanted = (noise.double() >= cumulative).sum(1)
    assert (action[:, 0] - wanted).abs().max() <= 1  # a number may lie between two roundings
    assert (action[:, 0] == wanted).float().mean() > 0.9
    before = torch.full((4096, 1000), 1e-3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sample(before, torch.rand(4096, 1), (1000,))
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert largest <= 8 * 8 * before.numel()
