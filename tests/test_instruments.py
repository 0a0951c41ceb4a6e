"""Instruments: known answers, naive loops, and that a training does not notice them."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from helpers import NVEC, fake_rollout, fake_targets, small_agent, starts, timeless
from reference_training import cell, summed
from torch import Tensor, nn

from ppo_tbptt.config import Config, PPOConfig
from ppo_tbptt.models import Agent, Core
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.ppo.instruments import every_nth_env, measure, measuring, quotient, scalars, stale_kl, state_drift
from ppo_tbptt.ppo.losses import PPOLoss
from ppo_tbptt.run.event_files import read_events
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.instruments import draw_gradients
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Frames, Rollout, Targets


class Linear(Core):
    """``y = s' = W s + x``, of which nobody knows gates. W is ``radius`` times a rotation."""

    def __init__(self, input_size: int, radius: float) -> None:
        super().__init__()
        self.state_size = self.output_size = input_size
        self.weight = nn.Parameter(radius * nn.init.orthogonal_(torch.empty(input_size, input_size)))

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for row in x:
            state = state @ self.weight.T + row
            outputs.append(state)
        return torch.stack(outputs), state


def ppo_loss(config: PPOConfig) -> PPOLoss:
    return PPOLoss(config=config, action_nvec=NVEC, clip_range=0.1, entropy_coef=0.01)


def curve_and_figures(agent: Agent, rollout: Rollout, loss: PPOLoss) -> tuple[Tensor, dict[str, float]]:
    with measuring(agent):
        measured = measure(agent, rollout, fake_targets(rollout), loss)
    return quotient(measured["gradient"]), scalars(measured)


@pytest.mark.parametrize(("radius", "horizon"), [(0.09, 2), (0.5, 7), (0.9, 23), (1.0, 23), (1.5, 23)])
def test_a_linear_core_decays_with_its_spectral_radius(radius: float, horizon: int) -> None:
    """Over 23 steps."""
    agent = small_agent()
    agent.core = Linear(agent.encoder.output_size, radius)
    start = torch.zeros(23, 4, dtype=torch.bool)
    start[0] = start[9, 1] = start[20, 2] = True
    curve, figures = curve_and_figures(agent, fake_rollout(agent, start), ppo_loss(PPOConfig()))
    torch.testing.assert_close(curve, radius ** torch.arange(23.0, dtype=torch.float64), rtol=1e-4, atol=0)
    assert figures["memory/gradient_horizon"] == horizon
    assert figures.keys() == {"memory/gradient_horizon", "memory/state_norm"}


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def moved(agent: Agent, seed: int = 5) -> Agent:
    """Other weights than those that collected a rollout, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in agent.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return agent


def pieces(rollout: Rollout, length: int | None) -> Iterator[tuple[int, int, int]]:
    """Of each sequence the environment, its first step and the one after its last."""
    for n in range(rollout.num_envs):
        begin = 0
        for t in range(1, rollout.num_steps + 1):
            if t == rollout.num_steps or rollout.start[t, n] or t - begin == length:
                yield n, begin, t
                begin = t


def naive_loss(
    agent: Agent, rollout: Rollout, targets: Targets, config: PPOConfig, t: int, n: int, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of one step by its formula, and the state after it."""
    output = agent.step({"obs": rollout.obs["obs"][t, n][None]}, state)
    log_prob, entropy = log_prob_and_entropy(output.logits, rollout.action[t, n][None], NVEC)
    ratios = (log_prob - rollout.log_prob[t, n]).exp()[0]
    if config.ratio == "joint":
        ratios = ratios.prod()[None]
    advantage, value, target = targets.advantage[t, n], rollout.value[t, n], targets.value_target[t, n]
    if config.normalize_advantage:
        advantage = (advantage - targets.advantage.mean()) / (targets.advantage.std(correction=0) + 1e-8)
    policy = sum(-min(r * advantage, r.clamp(0.9, 1.1) * advantage) for r in ratios) / len(ratios)
    clipped = value + (output.value[0] - value).clamp(-0.1, 0.1)
    error = max((output.value[0] - target) ** 2, (clipped - target) ** 2)
    return policy + config.value_coef * error - 0.01 * entropy[0], output.state_out


@pytest.mark.parametrize("core", ["gru", "ln_lstm", "rnn_relu"])
@pytest.mark.usefixtures("float64")
def test_gradients_equal_those_of_a_loop_for_each_state(core: str) -> None:
    """Each by an unroll of its own from that state on. The weights have moved, so that some ratios are clipped."""
    config = PPOConfig(
        sequence_length=6, ratio="per_branch" if core == "ln_lstm" else "joint", normalize_advantage=True
    )
    agent = small_agent(core, 2, 0.5)
    rollout = fake_rollout(agent, starts())
    targets = fake_targets(rollout)
    moved(agent).eval()
    norms: dict[int, list[tuple[float, float]]] = {}
    for n, begin, end in pieces(rollout, 6):
        states, state = [], rollout.state[begin, n][None]
        for t in range(begin, end):
            states.append(state.detach().requires_grad_())
            _, state = naive_loss(agent, rollout, targets, config, t, n, states[-1])
        own = []
        for k, first in enumerate(reversed(states)):
            state, loss = first, torch.zeros(())
            for t in range(end - 1 - k, end):
                loss, state = naive_loss(agent, rollout, targets, config, t, n, state)
            own.append(float(torch.autograd.grad(loss, first)[0].norm()))
            norms.setdefault(k, []).append((own[k], own[0]))
    wanted = [sum(a for a, _ in rows) / sum(b for _, b in rows) for _, rows in sorted(norms.items())]
    agent.train()
    curve, figures = curve_and_figures(agent, rollout, ppo_loss(config))
    assert curve.tolist() == pytest.approx(wanted, rel=1e-9)
    assert len(wanted) == 6
    assert figures["memory/gradient_horizon"] == next((k for k, x in enumerate(wanted) if x < 0.01), 6)
    assert figures["memory/state_norm"] == pytest.approx(
        sum(float(x.norm()) for x in rollout.state.rows.flatten(0, 1)) / rollout.start.numel()
    )


def naive_gates(agent: Agent, kind: str, obs: Tensor, state: Tensor) -> list[list[float]]:
    """Of each layer at one step, by the equations of torch's documentation."""
    core: Any = agent.core
    rnn, x, layers = core.rnn, agent.encoder({"obs": obs[None]})["obs"][0], []
    parts = state.view(-1, rnn.num_layers, rnn.hidden_size)
    for layer in range(rnn.num_layers):
        h = parts[0, layer]
        sums = summed(core, kind, layer, "ih", x) + summed(core, kind, layer, "hh", h)
        x, _ = cell(core, kind, layer, x, h, parts[-1, layer])
        if kind in ("gru", "ln_gru"):
            gates = [*sums.sigmoid()[: 2 * len(h)]]
        elif kind in ("lstm", "ln_lstm"):
            i, f, _, o = sums.sigmoid().chunk(4)
            gates = [*i, *f, *o]
        else:
            gates = [(u + 1) / 2 for u in x] if kind == "rnn_tanh" else [0.0 if u == 0 else 0.5 for u in x]
        layers.append([float(gate) for gate in gates])
    return layers


@pytest.mark.parametrize("kind", ["gru", "lstm", "rnn_tanh", "rnn_relu", "ln_gru", "ln_lstm"])
@torch.no_grad()
def test_saturation_is_the_share_of_gates_near_their_ends(kind: str) -> None:
    agent = moved(small_agent(kind, 2))
    for p in agent.core.parameters():
        p *= 3.0
    rollout = fake_rollout(agent, starts())
    shares = []
    for layer in range(2):
        steps = zip(rollout.obs["obs"].flatten(0, 1), rollout.state.rows.flatten(0, 1), strict=True)
        gates = [gate for obs, state in steps for gate in naive_gates(agent, kind, obs, state)[layer]]
        shares.append(sum(gate < 0.1 or gate > 0.9 for gate in gates) / len(gates))
    with torch.enable_grad():
        _, figures = curve_and_figures(agent, rollout, ppo_loss(PPOConfig()))
    assert [figures["memory/saturation_l0"], figures["memory/saturation_l1"]] == pytest.approx(shares)
    assert figures["memory/saturation"] == pytest.approx(sum(shares) / 2)
    assert all(0.05 < share < 0.95 for share in shares)


def test_drift_and_kl_by_hand() -> None:
    stored, fresh = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[0.0, 2.0]]])
    assert float(quotient(state_drift(stored, fresh))) == pytest.approx((5 + 5**0.5) / 2)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    fresh_logits, stale_logits = torch.cat((p.log(), q.log())), torch.cat((q.log(), q.log() - 2))  # of two branches
    wanted = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    one = stale_kl(fresh_logits[None], stale_logits[None], (2, 2))
    assert float(quotient(one)) == pytest.approx(wanted)
    two = stale_kl(torch.stack((fresh_logits, stale_logits)), stale_logits.expand(2, 4), (2, 2))
    assert float(quotient(two)) == pytest.approx(wanted / 2)


@pytest.mark.parametrize("norms", [[[0.0, 0.0], [0.0, 0.0]], [[torch.inf, torch.inf], [1.0, 1.0]]])
def test_what_could_not_be_measured_is_absent(norms: list[list[float]]) -> None:
    """No gradient at all, or none that is finite; the figure of it is empty."""
    measured = {"gradient": torch.tensor(norms, dtype=torch.float64), "state_norm": torch.tensor([[0.0, 0.0]]).double()}
    assert scalars(measured | {"saturation": torch.empty(0, 2, dtype=torch.float64)}) == {}
    assert draw_gradients(quotient(measured["gradient"]), title="nothing").axes


def test_some_environments_of_a_rollout() -> None:
    """Each of their steps shows the frame it did, and no other frame is kept."""
    rollout = fake_rollout(small_agent(), starts())
    table, number = torch.arange(92 * 3, dtype=torch.uint8).view(92, 1, 1, 3), torch.randperm(92).view(23, 4)
    shown = replace(rollout, obs={"obs": Frames(table, number)})
    targets = fake_targets(rollout)
    own, own_targets = every_nth_env(shown, targets, 3)
    assert torch.equal(own.obs["obs"].stacked(), table[number[:, [0, 3]]]) and len(own.obs["obs"].table) == 46
    assert torch.equal(own.state.rows, rollout.state[:, [0, 3]]) and own.num_envs == 2
    assert torch.equal(own_targets.advantage, targets.advantage[:, [0, 3]])
    assert every_nth_env(rollout, targets, 9)[0].num_envs == 1


# --- in a training ---------------------------------------------------------------------------------------------------

TASKS: dict[str, dict[str, Any]] = {
    "vectors, dropout": {
        "core": {"kind": "lstm", "num_layers": 2, "dropout": 0.5},
        "ppo": {"normalize_advantage": True},
    },
    "frames, stopped by KL": {
        "env": {"id": "reference_envs:reference/Image-v0"},
        "model": {"cnn_channels": [3, 4, 5]},
        "ppo": {"target_kl": 1e-4, "learning_rate": 1e-2, "sequence_length": None},
    },
    "no memory": {"core": {"kind": "none"}},
}


def train(config: Config, folder: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """What is logged, and the last checkpoint's content."""
    with Trainer(config, folder) as trainer:
        rows = []
        for report in trainer:
            rows.append(timeless(report.row()))
            assert all(module.training for module in trainer.agent.modules())
        return rows, trainer.state_dict()


def flat(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        for x in tree.values() if isinstance(tree, dict) else tree:
            yield from flat(x)
    else:
        yield tree.tolist() if isinstance(tree, Tensor) else tree


@pytest.mark.parametrize("name", TASKS)
def test_a_training_does_not_notice_them(name: str, tmp_path: Path) -> None:
    """All other figures, weights, the optimiser and all random streams are those of one without, bit for bit."""
    config = tiny(total_steps=192, **TASKS[name])
    plain, without = train(config, tmp_path / "without")
    rows, tree = train(config.replace(train={"instruments_every": 2}), tmp_path / "with")
    memory = [{tag: row[tag] for tag in row if tag.startswith("memory/")} for row in rows]
    assert [{tag: row[tag] for tag in row if not tag.startswith("memory/")} for row in rows] == plain
    del tree["config"], without["config"]
    assert list(flat(tree)) == list(flat(without))
    assert memory[0] == memory[2] == {}
    names = {"gradient_horizon", "saturation", "state_norm", "state_drift", "stale_kl"}
    if name == "no memory":
        assert memory[1] == {}
        return
    assert {f"memory/{x}" for x in names} <= memory[1].keys()
    epochs = int(rows[1]["optim/updates"]) // config.ppo.num_minibatches
    assert epochs == (1 if name == "frames, stopped by KL" else 2)
    for figure in ("state_drift", "stale_kl"):
        assert [f"memory/{figure}_epoch{epoch}" in memory[1] for epoch in range(2)] == [True, epochs == 2]
        assert memory[1][f"memory/{figure}"] == memory[1][f"memory/{figure}_epoch{epochs - 1}"]
    assert memory[1]["memory/state_drift"] > 0
    assert (memory[1]["memory/stale_kl"] > 0) == (config.ppo.sequence_length is not None)  # else no stale state is used
    (path,) = (tmp_path / "with").glob("events.out.tfevents.*")
    shown = {value.tag: (event.step, value) for event, _ in read_events(path) for value in event.summary.value}
    step, histogram = shown["hist/sequence_length"]
    assert (step, histogram.histo.num, histogram.histo.sum) == (128, rows[1]["sequences/count"], 64)
    step, drawn = shown["memory/gradient"]
    assert step == 128 and drawn.image.encoded_image_string.startswith(b"\x89PNG")


class NaiveStaleness(Callback):
    """Drift and KL of the environments 0 and 2 in loops over steps, with the weights after each epoch."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}

    @torch.no_grad()
    def after_epoch(self, iteration: Iteration, epoch: int) -> None:
        agent, rollout, fresh = iteration.trainer.agent, iteration.rollout, {}
        distance = norm = kl = 0.0
        for n in (0, 2):
            state = rollout.state[0, n]
            for t in range(rollout.num_steps):
                fresh[t, n] = state = torch.zeros_like(state) if rollout.start[t, n] else state
                distance, norm = distance + float((rollout.state[t, n] - state).norm()), norm + float(state.norm())
                state = self.step(agent, rollout, t, n, state)[1]
        for n, begin, end in pieces(rollout, 3):
            state = rollout.state[begin, n]
            for t in range(begin, end) if n in (0, 2) else ():
                q, state = self.step(agent, rollout, t, n, state)
                p, _ = self.step(agent, rollout, t, n, fresh[t, n])
                kl += float((p * (p / q).log()).sum()) / 32
        own = {"state_drift": distance / norm, "stale_kl": kl}
        self.figures |= own | {f"{name}_epoch{epoch}": value for name, value in own.items()}

    @staticmethod
    def step(agent: Agent, rollout: Rollout, t: int, n: int, state: Tensor) -> tuple[Tensor, Tensor]:
        output = agent.step({"obs": rollout.obs["obs"][t, n][None]}, state[None])
        return output.logits[0].softmax(0), output.state_out[0]


@pytest.mark.usefixtures("float64")
def test_staleness_equals_that_of_plain_loops() -> None:
    naive = NaiveStaleness()
    config = tiny(ppo={"sequence_length": 3, "learning_rate": 0.01}, train={"instruments_every": 1})
    with Trainer(config, callbacks=[naive]) as trainer:
        next(trainer)
        row = next(trainer).scalars
    assert len(naive.figures) == 6 and min(naive.figures.values()) > 1e-7
    for name, value in naive.figures.items():
        assert row[f"memory/{name}"] == pytest.approx(value, rel=1e-8), name
