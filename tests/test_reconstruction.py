"""Reconstruction of frames from the core's output, against plain loops over steps and pixels' formulas."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from configs_for_tests import tiny
from helpers import small_agent, tiny_agent
from torch import Tensor
from torch.nn import functional as F

from ppo_tbptt.config import ConfigError, PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.losses import build_losses
from ppo_tbptt.ppo.reconstruction import Decoder, Reconstruction
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Frames, Minibatch

SHAPES = {"first": (36, 40, 3), "vector": (2,), "second.one": (39, 37, 1)}
NUMBERS = [2, 0, 2, 1, 0]
"""Which frame each of five steps shows."""


@pytest.fixture
def agent() -> Any:
    torch.set_default_dtype(torch.float64)
    yield tiny_agent(SHAPES, (2,))
    torch.set_default_dtype(torch.float32)


def minibatch(repeat: bool) -> Minibatch:
    """Two sequences, of three and two steps; frames by number, or one for each step."""
    generator = torch.Generator().manual_seed(1)
    number, ones = torch.tensor(NUMBERS), torch.ones(5)
    tables = {
        key: torch.randint(0, 256, (3, *shape), generator=generator, dtype=torch.uint8)
        for key, shape in SHAPES.items()
        if len(shape) == 3
    }
    obs: dict[str, Any] = {key: Frames(x, number) if repeat else x[number] for key, x in tables.items()}
    obs["vector"] = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    action = torch.zeros(5, 1, dtype=torch.int64)
    sizes, start = torch.tensor([2, 2, 1]), torch.tensor([True, False])
    per_step: dict[str, Any] = {"log_prob": ones[:, None], "value": ones, "advantage": ones, "value_target": ones}
    state = torch.zeros(2, 8)
    return Minibatch(obs=obs, action=action, state=state, start=start, sequences_per_step=sizes, **per_step)


def naive(agent: Agent, loss: Reconstruction, batch: Minibatch, steps: list[int]) -> Tensor:
    """The cross-entropy of every pixel of these steps, by its definition."""
    output = agent.unroll(batch.obs, batch.state, batch.sequences_per_step)
    total = torch.zeros(())
    for key, name in (("first", "first"), ("second.one", "second_one")):
        entropies = []
        for step in steps:
            obs = batch.obs[key]
            frame = obs.table[NUMBERS[step]] if isinstance(obs, Frames) else obs[step]
            p, y = loss.decoders[name](output.core_output[step : step + 1])[0].sigmoid(), frame.double() / 255
            entropies.append(-(y * p.log() + (1 - y) * (1 - p).log()).flatten())
        total = total + torch.cat(entropies).mean()
    return total


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("counted", [None, [0, 3, 4]])
def test_loss_and_gradients_equal_the_formula(agent: Agent, repeat: bool, counted: list[int] | None) -> None:
    coef = 0.3
    (aux,) = build_losses({"reconstruction": coef}, agent)
    loss: Any = aux.loss
    batch = replace(minibatch(repeat), in_loss=None if counted is None else torch.tensor(counted))
    generator = torch.Generator()
    with_it, without = (
        Learner(agent, PPOConfig(), total_steps=1, generator=generator, auxiliary=losses) for losses in ([aux], [])
    )
    total, figures = with_it.loss(batch, with_it.ppo_loss(0))
    plain, _ = without.loss(batch, without.ppo_loss(0))
    expected = naive(agent, loss, batch, list(range(5)) if counted is None else counted)
    assert figures["loss/reconstruction"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert all(name.startswith("decoders.") for name in loss.state_dict())
    parameters = with_it.parameters()
    assert len(parameters) == len(list(agent.parameters())) + 2 * 8
    actual = torch.autograd.grad(total, parameters)
    wanted = torch.autograd.grad(plain + coef * expected, parameters)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_decoder_mirrors_the_encoder(agent: Agent) -> None:
    """With the encoder's own kernels and no biases each transposed convolution is the adjoint of the convolution."""
    for key, name in agent.encoder.names.items():
        if len(SHAPES[key]) == 1:
            continue
        convolutions = [x for x in agent.encoder.parts[name].modules() if isinstance(x, torch.nn.Conv2d)]
        decoder = Decoder(8, SHAPES[key], agent.encoder.parts[name])
        mirrored = [x for x in decoder.modules() if isinstance(x, torch.nn.ConvTranspose2d)]
        x = torch.randn(1, SHAPES[key][2], *SHAPES[key][:2])
        for there, back in zip(convolutions, reversed(mirrored), strict=True):
            y = F.conv2d(x, there.weight, None, there.stride)
            z = torch.randn_like(y)
            back.weight.data, back.bias.data = there.weight.data, torch.zeros_like(back.bias)  # type: ignore
            assert (y * z).sum().item() == pytest.approx((x * back(z)).sum().item())
            x = y
        assert decoder(torch.randn(4, 8)).shape == (4, *SHAPES[key])
        assert decoder.dense.out_features == x.numel()


def test_it_learns_what_is_seen(agent: Agent) -> None:
    """Black frames, white ones, and one of each half: far better than by the share of white at each pixel."""
    (aux,) = build_losses({"reconstruction": 1.0}, agent)
    learner = Learner(agent, PPOConfig(), total_steps=1, generator=torch.Generator(), auxiliary=[aux])
    batch = minibatch(repeat=True)
    for frames in batch.obs.values():
        if isinstance(frames, Frames):
            frames.table[:2] = torch.tensor([0, 255])[:, None, None, None]
            frames.table[2] = 255 * (torch.arange(frames.table.shape[1]) < 18)[:, None, None]
    shown = batch.obs["first"].stacked().double() / 255
    uninformed = 2 * F.binary_cross_entropy(shown.mean(0).expand_as(shown), shown).item()
    optimizer, losses = torch.optim.Adam(learner.parameters(), 1e-2), []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(learner.backward(batch, learner.ppo_loss(0))["loss/reconstruction"]))
        optimizer.step()
    assert losses[0] > uninformed and losses[-1] < uninformed / 2, (uninformed, losses[::10])


def test_without_a_frame_it_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^aux\.reconstruction_coef: none of the observations .* must be 0$"
    ) as caught:
        Trainer(tiny(aux={"reconstruction_coef": 0.1}), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"\(obs\)"):
        build_losses({"reconstruction": 0.1}, small_agent())
