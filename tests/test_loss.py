"""Auxiliary losses beside PPO's (which test_reference_training.py compares with a naive one)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import NVEC, fake_rollout, fake_targets, small_agent, starts, update_once
from torch import Tensor, nn

from ppo_tbptt.config import ConfigError, PPOConfig, Schedule
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy
from ppo_tbptt.ppo.learner import Learner, UpdateStats
from ppo_tbptt.ppo.losses import PPOLoss, build_losses
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.types import AgentOutput, Minibatch


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


def learner(coefs: dict[str, float], **changes: Any) -> Learner:
    agent, options = small_agent(), {"num_epochs": 2, "num_minibatches": 3, "sequence_length": 8, **changes}
    config = PPOConfig(normalize_advantage=True, **options)
    generator = torch.Generator().manual_seed(0)
    return Learner(agent, config, total_steps=1000, generator=generator, auxiliary=build_losses(coefs, agent))


def test_auxiliary_losses_train_the_agent_and_their_own_weights_and_report_by_name() -> None:
    with_aux, without = learner(HERE), learner({})
    decoder = with_aux.loss_modules["Decoder"]
    before = decoder.state_dict()["linear.weight"].clone()
    figures = update_once(with_aux).scalars
    assert not torch.equal(decoder.state_dict()["linear.weight"], before)
    assert figures.keys() - update_once(without).scalars.keys() == {
        "loss/Decoder",
        "decoder/largest_error",
        "loss/small_values",
    }
    weights = [torch.cat([p.detach().flatten() for p in x.agent.parameters()]) for x in (with_aux, without)]
    assert not torch.equal(*weights)
    parts = figures["loss/policy"] + 0.5 * figures["loss/value"] - 1e-4 * figures["policy/entropy"]
    total = parts + 0.3 * figures["loss/Decoder"] + 2.0 * figures["loss/small_values"]
    assert figures["loss/total"] == pytest.approx(total, rel=1e-5)


def test_a_ratio_at_the_edge_of_the_clip_range_is_inside() -> None:
    agent = small_agent()
    rollout = fake_rollout(agent, starts())
    sequences = cut(rollout.start, None)
    batch = gather(rollout, fake_targets(rollout), sequences, torch.arange(sequences.mask.shape[1]))
    output = agent.unroll(batch.obs, batch.state, batch.sequences_per_step)
    batch = replace(batch, log_prob=log_prob_and_entropy(output.logits, batch.action, NVEC)[0])
    _, figures = PPOLoss(config=PPOConfig(), action_nvec=NVEC, clip_range=0.0, entropy_coef=0.0)(batch, output)
    assert figures["policy/clip_fraction"] == 0


def fickle(batch: Minibatch, output: AgentOutput) -> tuple[Tensor, dict[str, Tensor]]:
    return output.value.sum() * 0, {f"fickle/{len(output.value)}": torch.ones(())}


def test_a_loss_must_report_the_same_figures_for_all_minibatches() -> None:
    with pytest.raises(ValueError, match=r"^losses must report the same figures for all minibatches$"):
        update_once(learner({"test_loss:fickle": 1.0}))


def test_epochs_end_after_the_first_that_exceeds_target_kl() -> None:
    def update(**options: Any) -> UpdateStats:
        return update_once(learner({}, learning_rate=Schedule(initial=1e-2), **options))

    first, both = (update(num_epochs=n).scalars["policy/approx_kl"] for n in (1, 2))
    assert both > first > 0
    for target_kl, num_epochs in [(1e6, 4), (first, 2), (0.999 * first, 1)]:
        assert update(num_epochs=4, target_kl=target_kl).num_updates == 3 * num_epochs
    assert update(num_epochs=4, num_minibatches=1, target_kl=1e6).num_updates == 4


def test_what_was_saved_of_other_losses_is_left_and_of_other_networks_refused() -> None:
    """Learners with the same losses go on bit for bit: see test_user_modules.py."""
    with_aux, plain = learner(HERE), learner({})
    update_once(with_aux)
    saved = with_aux.state_dict()
    plain.load_state_dict(saved)
    assert len(plain.optimizer.state) == len(plain.parameters())
    with_aux.load_state_dict({"optimizer": plain.optimizer.state_dict()})  # a checkpoint from before there were losses
    update_once(with_aux)
    with pytest.raises(ValueError, match="of another network"):
        Learner(small_agent("lstm"), PPOConfig(), total_steps=1, generator=torch.Generator()).load_state_dict(saved)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["recon"], r"'recon' is unknown; must be module:name or built in \(reconstruction\)"),
        (["no_such_module:loss"], "ModuleNotFoundError"),
        (["test_loss:HERE"], "dict can't be called"),
        (["test_loss:Minibatch"], "TypeError: "),
        (["test_loss:value"], "there is a loss of the name 'value' already"),
        (["test_loss:Decoder", "elsewhere:Decoder"], "'elsewhere:Decoder': there is a loss of the name"),
    ],
)
def test_a_loss_that_cannot_be_built_is_one_line(names: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^losses: .*{complaint}") as caught:
        build_losses(dict.fromkeys(names, 1.0), small_agent())
    assert "\n" not in str(caught.value)
