"""PPO's loss by hand, and auxiliary losses beside it."""

import math
from typing import Any

import pytest
import torch
from helpers import fake_rollout, fake_targets, small_agent
from torch import Tensor, nn

from ppo_tbptt.config import ConfigError, PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import PPOLoss, build_losses
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import AgentOutput, Minibatch


def logits_of(p: Tensor) -> Tensor:
    """Of branches of two choices each, the first of which has these probabilities [M, A]."""
    return torch.stack((p, 1 - p), 2).log().flatten(1)


def loss(p: Tensor, old: Tensor, clip_range: float = 0.2, entropy_coef: float = 0.1, **changes: Any) -> Any:
    """The loss and figures of 4 steps in which every branch's first choice was taken: ratios are p / old."""
    config = {"value_coef": 0.5, "ratio": "joint", "clip_value_loss": True}
    config |= {key: changes.pop(key) for key in list(changes) if key in config}
    zero = torch.zeros(4)
    batch = Minibatch(
        obs={},
        action=torch.zeros(p.shape, dtype=torch.int64),
        log_prob=old.log(),
        value=zero,
        advantage=changes.get("advantage", torch.tensor([1.0, -1.0, 2.0, 0.0])),
        value_target=torch.tensor([2.0, 1.0, 0.0, 0.0]),
        state=torch.zeros(4, 0),
        sequences_per_step=torch.tensor([4]),
    )
    output = AgentOutput(
        logits=logits_of(p),
        value=changes.get("value", torch.tensor([1.0, 0.0, 0.0, 0.0])),
        features=zero[:, None],
        core_output=zero[:, None],
        state_out=torch.zeros(4, 0),
    )
    nvec = (2,) * p.shape[1]
    ppo = PPOLoss(config=PPOConfig(**config), action_nvec=nvec, clip_range=clip_range, entropy_coef=entropy_coef)
    return ppo(batch, output)


RATIOS = torch.tensor([[1.5], [0.5], [1.1], [1.0]])
OLD = torch.full((4, 1), 0.5)


def test_by_hand() -> None:
    total, figures = loss(RATIOS * OLD, OLD)
    p = (RATIOS * OLD).flatten().tolist()
    entropy = sum(-x * math.log(x) - (1 - x) * math.log(1 - x) for x in p) / 4
    ratios = RATIOS.flatten().tolist()
    wanted = {
        # ratios 1.5 0.5 1.1 1: min(1.5, 1.2) = 1.2; min(-0.5, -0.8) = -0.8; 2.2; 0
        "loss/policy": -(1.2 - 0.8 + 2.2) / 4,
        # value moved by 1, clipped to 0.2: max((1 - 2)^2, (0.2 - 2)^2) = 3.24; then 1, 0, 0
        "loss/value": (3.24 + 1) / 4,
        "policy/entropy": entropy,
        "policy/approx_kl": sum(r - 1 - math.log(r) for r in ratios) / 4,
        "policy/clip_fraction": 0.5,
    }
    assert {tag: float(x) for tag, x in figures.items()} == pytest.approx(wanted, rel=1e-5)
    assert float(total) == pytest.approx(-0.65 + 0.5 * 1.06 - 0.1 * entropy)
    assert float(loss(RATIOS * OLD, OLD, clip_value_loss=False)[1]["loss/value"]) == pytest.approx(0.5)


def gradient(ratio: Tensor, advantage: Tensor) -> Tensor:
    """Of the policy loss by the log-probabilities."""
    log_prob = (ratio * OLD).log().requires_grad_()
    total, _ = loss(log_prob.exp(), OLD, value_coef=0.0, entropy_coef=0.0, advantage=advantage)
    return torch.autograd.grad(total, log_prob)[0][:, 0]


def test_policy_gradient() -> None:
    """At ratio 1 it is REINFORCE's; ratios 1.5 and 0.5 have none where the advantage asks to go further."""
    advantage = torch.tensor([1.0, -1.0, 2.0, 0.5])
    torch.testing.assert_close(gradient(torch.ones(4, 1), advantage), -advantage / 4)
    result = gradient(torch.tensor([[1.5], [0.5], [1.5], [0.5]]), torch.tensor([1.0, -1.0, -1.0, 1.0]))
    torch.testing.assert_close(result, torch.tensor([0.0, 0.0, 1.5 / 4, -0.5 / 4]))


# --- auxiliary losses ----------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Reconstructs observations from the core's output."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.linear = nn.Linear(agent.core.output_size, agent.obs_shapes["obs"][0])

    def forward(self, batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
        error = self.linear(output.core_output) - batch.obs["obs"]
        return error.square().mean(), {"decoder/largest_error": error.detach().abs().max()}


def small_values(batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
    return output.value.square().mean(), {}


HERE = {"test_loss:Decoder": 0.3, "test_loss:small_values": 2.0}


def learner(coefs: dict[str, float]) -> Learner:
    agent = small_agent()
    config = PPOConfig(num_epochs=2, num_minibatches=3, sequence_length=8, normalize_advantage=True)
    generator = torch.Generator().manual_seed(0)
    return Learner(agent, config, total_steps=1000, generator=generator, auxiliary=build_losses(coefs, agent))


def train(learner: Learner) -> dict[str, float]:
    rollout = fake_rollout(small_agent(), torch.rand(23, 4, generator=torch.Generator().manual_seed(3)) < 0.15)
    return learner.update(rollout, fake_targets(rollout), 0, Timer()).scalars


def test_auxiliary_losses_train_the_agent_and_their_own_weights_and_report_by_name() -> None:
    with_aux, without = learner(HERE), learner({})
    decoder = with_aux.loss_modules["Decoder"]
    before = decoder.state_dict()["linear.weight"].clone()
    figures = train(with_aux)
    assert not torch.equal(decoder.state_dict()["linear.weight"], before)
    assert figures.keys() - train(without).keys() == {"loss/Decoder", "decoder/largest_error", "loss/small_values"}
    weights = [torch.cat([p.detach().flatten() for p in x.agent.parameters()]) for x in (with_aux, without)]
    assert not torch.equal(*weights)
    parts = figures["loss/policy"] + 0.5 * figures["loss/value"] - 1e-4 * figures["policy/entropy"]
    total = parts + 0.3 * figures["loss/Decoder"] + 2.0 * figures["loss/small_values"]
    assert figures["loss/total"] == pytest.approx(total, rel=1e-5)


def test_the_state_of_a_learner_goes_on() -> None:
    """With its losses; without what was saved of others."""
    whole, parts = learner(HERE), learner(HERE)
    train(whole)
    expected = train(whole)
    train(parts)
    again = learner(HERE)
    again.agent.load_state_dict(parts.agent.state_dict())
    again.generator.set_state(parts.generator.get_state())
    again.load_state_dict(parts.state_dict())
    assert train(again) == expected

    saved, plain = parts.state_dict(), learner({})
    plain.load_state_dict(saved)
    assert len(plain.optimizer.state) == len(plain.parameters())
    again.load_state_dict({"optimizer": plain.optimizer.state_dict()})  # a checkpoint from before there were losses
    train(again)
    with pytest.raises(ValueError, match="of another network"):
        Learner(small_agent("lstm"), PPOConfig(), total_steps=1, generator=torch.Generator()).load_state_dict(saved)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["reconstruction"], "'reconstruction' is unknown; must be module:name or built in"),
        (["no_such_module:loss"], "ModuleNotFoundError"),
        (["test_loss:OLD"], "Tensor can't be called"),
        (["test_loss:Minibatch"], "TypeError: "),
        (["test_loss:value"], "there is a loss of the name 'value' already"),
        (["test_loss:Decoder", "elsewhere:Decoder"], "'elsewhere:Decoder': there is a loss of the name"),
    ],
)
def test_a_loss_that_cannot_be_built_is_one_line(names: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^losses: .*{complaint}") as caught:
        build_losses(dict.fromkeys(names, 1.0), small_agent())
    assert "\n" not in str(caught.value)
