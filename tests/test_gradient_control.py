"""Between backward pass and optimiser: clipping, and the regulariser of the gradient's norm through time."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from configs_for_tests import base, error_of, tiny
from helpers import fake_rollout, fake_targets, poison, small_agent, starts, train, update_once
from reference_training import summed
from torch import Tensor

from ppo_tbptt.config import Config, ConfigError, PPOConfig, Schedule
from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import AuxiliaryLoss
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import AgentOutput, Minibatch

KINDS = ["rnn_tanh", "rnn_relu", "gru"]


def learner(agent: Agent, **config: Any) -> Learner:
    """One whose single step leaves the gradients it used, and the weights as they were."""
    settings: dict[str, Any] = {"num_epochs": 1, "num_minibatches": 1, "sequence_length": 6, "max_grad_norm": 0.05}
    ppo = PPOConfig(**{**settings, "learning_rate": Schedule(initial=0.0), **config})
    return Learner(agent, ppo, total_steps=1000, generator=torch.Generator())


def gradients_of_update(agent: Agent, **config: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradients that an update's one step used, by parameter, and its scalars."""
    rollout = fake_rollout(agent, starts())
    stats = learner(agent, **config).update(rollout, fake_targets(rollout), 0, Timer())
    return {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}, stats.scalars


# Clipping


def test_each_kind_of_clipping_bounds_what_it_says_and_reports_the_norm_before() -> None:
    plain, scalars = gradients_of_update(small_agent(), grad_clip="none")
    norm = math.sqrt(sum(float(g.square().sum()) for g in plain.values()))
    assert scalars["optim/grad_norm"] == pytest.approx(norm)

    def scaled(g: Tensor, norm: float) -> Tensor:
        return g * min(1.0, 0.05 / (norm + 1e-6))

    expected = {
        "norm": {name: scaled(g, norm) for name, g in plain.items()},
        "value": {name: g.clamp(-0.05, 0.05) for name, g in plain.items()},
        "per_layer": {name: scaled(g, float(g.norm())) for name, g in plain.items()},
    }
    norms = [float(g.norm()) for g in plain.values()]
    assert min(norms) < 0.05 < max(norms) and max(float(g.abs().max()) for g in plain.values()) > 0.05
    for kind, wanted in expected.items():
        clipped, scalars = gradients_of_update(small_agent(), grad_clip=kind)
        assert scalars["optim/grad_norm"] == pytest.approx(norm), kind
        for name, g in wanted.items():
            torch.testing.assert_close(clipped[name], g, msg=lambda text, at=f"{kind} {name}": f"{at}: {text}")


@pytest.mark.parametrize("kind", ["value", "per_layer", "none"])
def test_an_update_that_is_not_finite_is_skipped_however_gradients_are_clipped(kind: Any) -> None:
    config = PPOConfig(rollout_steps=23, num_epochs=2, num_minibatches=3, sequence_length=8, grad_clip=kind)
    auxiliary = [poison(lambda k: k == 2)]
    other = Learner(small_agent(), config, total_steps=1000, generator=torch.Generator(), auxiliary=auxiliary)
    assert update_once(other).num_nonfinite == 1
    assert all(p.isfinite().all() for p in other.agent.parameters())


class EverySecond(torch.nn.Module):
    """A loss whose parameter has a part in every second minibatch only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(1)), 0

    def forward(self, batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        return (self.weight if self.calls % 2 else output.value).sum() * 0.1, {}


def test_a_parameter_without_a_part_in_a_minibatch_has_a_gradient_of_zero() -> None:
    """So one process steps as ranks do, of which only some may have a gradient."""
    module = EverySecond()
    config = PPOConfig(num_epochs=2, num_minibatches=2, weight_decay=0.0, grad_clip="none")
    auxiliary = [AuxiliaryLoss(name="every_second", coef=1.0, loss=module)]
    own = Learner(small_agent(), config, total_steps=1000, generator=torch.Generator(), auxiliary=auxiliary)
    update_once(own)
    wanted = torch.nn.Parameter(torch.ones(1))
    adam = torch.optim.AdamW([wanted], lr=config.learning_rate.initial, weight_decay=0.0)
    for gradient in (0.1, 0.0, 0.1, 0.0):
        wanted.grad = torch.tensor([gradient])
        adam.step()
    torch.testing.assert_close(module.weight, wanted)


# The regulariser of Pascanu et al. 2013


class Naive:
    """The loss of a minibatch in plain loops over sequences and steps, and what the regulariser looks at."""

    def __init__(self, agent: Agent, batch: Minibatch, loss: Learner) -> None:
        self.agent = agent
        self.core: Any = agent.core
        self.kind = next(kind for kind, core in CORES.items() if type(agent.core) is core)
        self.lengths = [int((batch.sequences_per_step > s).sum()) for s in range(len(batch.state))]
        self.layers = self.core.rnn.num_layers
        self.pairs: list[tuple[int, Tensor, Tensor, Tensor]] = []
        """Layer, what of x_{t+1} reaches the cell, h_t, h_{t+1}."""
        ends = batch.sequences_per_step.cumsum(0)
        features = agent.encoder({"obs": batch.obs["obs"]})["obs"]
        rows: dict[int, Tensor] = {}
        for s, length in enumerate(self.lengths):
            h = list(batch.state[s].view(self.layers, -1))
            for t in range(length):
                row = int(ends[t] - batch.sequences_per_step[t]) + s
                x = features[row]
                for layer in range(self.layers):
                    p = summed(self.core, self.kind, layer, "ih", x)
                    after = self.cell(layer, p, h[layer])
                    if t:
                        self.pairs.append((layer, p, h[layer], after))
                    h[layer] = x = after
                rows[row] = x
        self.y = torch.stack([rows[row] for row in range(len(rows))])
        logits, value = agent.heads(self.y)
        output = agent.unroll(batch.obs, batch.state, batch.sequences_per_step)
        torch.testing.assert_close(output.logits, logits)
        self.loss = loss.ppo_loss(0)(batch, replace(output, logits=logits, value=value))[0]

    def cell(self, layer: int, p: Tensor, h: Tensor) -> Tensor:
        q = summed(self.core, self.kind, layer, "hh", h)
        if len(p) == len(h):
            return (p + q).tanh() if self.kind == "rnn_tanh" else (p + q).relu()
        (pr, pz, pn), (qr, qz, qn) = p.chunk(3), q.chunk(3)
        z = (pz + qz).sigmoid()
        return (1 - z) * (pn + (pr + qr).sigmoid() * qn).tanh() + z * h

    def held(self) -> list[tuple[int, Tensor, Tensor, Tensor]]:
        """Layer, p, h_t and the signal at t + 1 of each pair: constants from here on."""
        signals = torch.autograd.grad(self.loss, [after for *_, after in self.pairs], retain_graph=True)
        return [(i, p.detach(), h.detach(), g) for (i, p, h, _), g in zip(self.pairs, signals, strict=True)]

    def omega(self, held: list[tuple[int, Tensor, Tensor, Tensor]]) -> Tensor:
        """Pair by pair, with the whole Jacobian of each."""
        terms = []
        for layer, p, h, g in held:
            if g.norm() > 0:
                jacobian: Any = torch.autograd.functional.jacobian(
                    lambda h, layer=layer, p=p: self.cell(layer, p, h), h, create_graph=True
                )
                terms.append(((g @ jacobian).norm() / g.norm() - 1) ** 2)
        return torch.stack(terms).mean()

    def recurrent(self) -> dict[str, Tensor]:
        return {f"core.{name}": p for name, p in self.core.named_parameters() if "_hh_" in name}


@pytest.fixture
def _float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def unregularised_and_naive(kind: str, layers: int, **config: Any) -> tuple[dict[str, Tensor], Naive, Agent]:
    agent = small_agent(kind, layers)
    for name, p in agent.core.named_parameters():
        if "bias" in name or "gain" in name:
            torch.nn.init.normal_(p, float("gain" in name), 0.3)
    without, _ = gradients_of_update(agent, grad_clip="none", **config)
    rollout = fake_rollout(agent, starts())
    sequences = cut(rollout.start, 6)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    return without, Naive(agent.train(), batch, learner(agent)), agent


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("execution", ["packed", "padded"])
@pytest.mark.parametrize(("kind", "layers"), [("rnn_tanh", 1), ("rnn_relu", 2), ("gru", 2), ("ln_gru", 1)])
def test_the_regulariser_is_that_of_plain_loops(kind: str, layers: int, execution: str) -> None:
    """Value and gradient; it reaches the recurrent weights and biases alone."""
    without, naive, agent = unregularised_and_naive(kind, layers)
    agent.core.padded = execution == "padded"
    omega = naive.omega(naive.held())
    recurrent = naive.recurrent()
    own = dict(zip(recurrent, torch.autograd.grad(omega, list(recurrent.values())), strict=True))
    got, scalars = gradients_of_update(agent, grad_clip="none", jacobian_norm_coef=0.7)
    assert scalars["loss/jacobian_norm"] == pytest.approx(omega.item(), rel=1e-10)
    assert omega > 1e-3 and all(float(g.abs().max()) > 1e-4 for g in own.values() if g.any())
    for name, g in without.items():
        want = g + 0.7 * own[name] if name in own else g
        torch.testing.assert_close(got[name], want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("kind", KINDS)
def test_its_gradient_is_that_of_finite_differences_which_hold_the_same_things_fixed(kind: str) -> None:
    without, naive, agent = unregularised_and_naive(kind, 1)
    got, _ = gradients_of_update(agent, grad_clip="none", jacobian_norm_coef=1.0)
    held = naive.held()
    for name, p in naive.recurrent().items():
        own, numeric = got[name] - without[name], torch.zeros_like(p)
        for i in range(0, p.numel(), 31):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * 1e-5
                values.append(naive.omega(held).item())
                with torch.no_grad():
                    p.view(-1)[i] -= sign * 1e-5
            numeric.view(-1)[i] = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(own.flatten()[::31], numeric.flatten()[::31], rtol=1e-5, atol=1e-7)


def test_it_has_no_scale_so_small_losses_are_regularised_alike() -> None:
    """The square of a gradient of 1e-25 is 0 in float32."""
    agent = small_agent("gru")
    rollout = fake_rollout(agent, starts())
    values = []
    for scale in (1.0, 1e-25):
        targets = fake_targets(rollout)
        targets = replace(targets, advantage=targets.advantage * scale, value_target=rollout.value)
        config = {"jacobian_norm_coef": 1.0, "value_coef": 0.0, "entropy_coef": Schedule(initial=0.0)}
        values.append(learner(agent, **config).update(rollout, targets, 0, Timer()).scalars["loss/jacobian_norm"])
    assert values[1] == pytest.approx(values[0], rel=1e-3) and values[0] > 1e-3


def test_sequences_of_one_step_have_no_pairs() -> None:
    agent = small_agent("gru")
    without, _ = gradients_of_update(agent, sequence_length=1)
    got, scalars = gradients_of_update(agent, sequence_length=1, jacobian_norm_coef=1.0)
    assert scalars["loss/jacobian_norm"] == 0
    assert all(torch.equal(got[name], g) for name, g in without.items())


def test_it_brings_the_norm_of_gradients_through_time_nearer_to_constant() -> None:
    """And its figure is a part of the total loss."""
    coefs, fast = (1e-6, 5.0), {"learning_rate": 1e-2}
    rows = {coef: train(tiny(total_steps=512, ppo={**fast, "jacobian_norm_coef": coef})) for coef in coefs}
    assert rows[5.0][-1]["loss/jacobian_norm"] < 0.5 * rows[1e-6][-1]["loss/jacobian_norm"]
    row = rows[5.0][0]
    parts = row["loss/policy"] + 0.5 * row["loss/value"] - row["optim/entropy_coef"] * row["policy/entropy"]
    assert row["loss/total"] == pytest.approx(parts + 5 * row["loss/jacobian_norm"], abs=1e-5)
    assert "loss/jacobian_norm" not in train(tiny(total_steps=64))[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"core": {"kind": "lstm"}},
            ["ppo.jacobian_norm_coef: ", "0.1", '"lstm"', "rnn_tanh, rnn_relu, irnn, gru, ln_gru"],
        ),
        ({"core": {"kind": "ln_lstm"}}, ["ppo.jacobian_norm_coef: ", "0.1", '"ln_lstm"', "must be 0"]),
        ({"core": {"kind": "none"}}, ["ppo.jacobian_norm_coef: ", "0.1", '"none"', "must be 0"]),
        ({"core": {"kind": "my_module:Mine"}}, ["ppo.jacobian_norm_coef: ", "0.1", '"my_module:Mine"', "must be 0"]),
        ({"ppo": {"sequence_length": 1}}, ["ppo.jacobian_norm_coef: ", "sequence_length is 1", "must be 0"]),
    ],
)
def test_it_is_refused_where_there_is_nothing_to_regularise(changes: dict[str, Any], words: list[str]) -> None:
    tree = base(**{**changes, "ppo": {"jacobian_norm_coef": 0.1, **changes.get("ppo", {})}})
    message = error_of(Config.from_dict, tree)
    assert all(word in message for word in words), message


def test_a_core_that_the_config_does_not_know_is_refused_too() -> None:
    with pytest.raises(
        ConfigError, match=r"^ppo\.jacobian_norm_coef: 0\.1 .* LSTM; must be 0, or the core one of rnn_tanh"
    ):
        Trainer(tiny(ppo={"jacobian_norm_coef": 0.1}), agent=small_agent("lstm"))
