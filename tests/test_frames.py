"""Equal frames are stored and encoded once, and everything comes out as if each were encoded by itself."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import collect, fake_targets, tiny_agent, train, worst_replay
from test_resume import assert_equal_runs
from torch import Tensor

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.collector import empty_rollout
from ppo_tbptt.ppo.frames import FeatureCache, FrameTable
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Frames, Minibatch, Rollout

SHAPE = (36, 36, 3)
SHAPES = {"image": SHAPE, "vector": (4,)}
STEPS, ENVS = 12, 4


def hashes(*values: int) -> np.ndarray:
    return np.array([[value, 7] for value in values], np.uint64)


def images(*values: int) -> Tensor:
    return torch.stack([torch.full(SHAPE, value, dtype=torch.uint8) for value in values])


def table(limit: int = 100) -> FrameTable:
    return FrameTable(SHAPE, limit, torch.device("cpu"))


def test_frames_are_numbered_in_order_and_stored_once() -> None:
    frames = table()
    assert frames.add(images(5, 6, 5), hashes(5, 6, 5)).tolist() == [0, 1, 0]
    assert frames.add(images(7, 5, 8, 7), hashes(7, 5, 8, 7)).tolist() == [2, 0, 3, 2]
    assert frames.add(images(6), hashes(6)).tolist() == [1]
    assert torch.equal(frames.frames, images(5, 6, 7, 8)) and frames.num_distinct == 4
    frames.clear(distinct=True)
    assert frames.add(images(8, 5), hashes(8, 5)).tolist() == [0, 1]
    assert torch.equal(frames.frames, images(8, 5))


def test_what_is_equal_is_decided_by_the_hash_alone() -> None:
    """All of its bits count. A collision would show the first frame: the module says how unlikely that is."""
    frames = table()
    other = hashes(1)
    other[0, 1] = 8
    assert frames.add(images(1, 2), np.concatenate([hashes(1), other])).tolist() == [0, 1]
    assert frames.add(images(3), hashes(1)).tolist() == [0]
    assert torch.equal(frames.frames, images(1, 2))


def test_without_numbers_every_frame_is_stored_and_distinct_ones_are_counted() -> None:
    frames = table()
    frames.clear(distinct=False)
    assert frames.add(images(5, 5, 6), hashes(5, 5, 6)).tolist() == [0, 1, 2]
    assert frames.add(images(5), hashes(5)).tolist() == [3]
    assert torch.equal(frames.frames, images(5, 5, 6, 5)) and frames.num_distinct == 2


def test_tables_grow() -> None:
    """On a GPU, and in page-locked memory, they begin small; here it is forced."""
    frames, agent = table(3000), tiny_agent({"obs": SHAPE}, (2,))
    frames.memory = frames.memory[:2].clone()
    cache, number = FeatureCache(agent), torch.arange(2)
    with agent.acting():
        frames.add(images(1, 2), hashes(1, 2))
        first = cache.project("obs", frames, number).values[:2].clone()
        frames.add(images(3, 4, 5), hashes(3, 4, 5))
        projected = cache.project("obs", frames, torch.tensor([4, 0])).values
        wanted = agent.project({"obs": images(1, 2, 3, 4, 5)})["obs"]
    assert torch.equal(frames.frames, images(1, 2, 3, 4, 5)) and len(frames.memory) == 5
    assert torch.equal(projected[:2], first)
    torch.testing.assert_close(projected[:5], wanted)


def some_rollout(agent: Agent, num_frames: int, dtype: torch.dtype = torch.float32) -> Rollout:
    """Random observations, of which the images show ``num_frames`` frames."""
    generator = torch.Generator().manual_seed(0)
    rollout = empty_rollout(agent, STEPS, ENVS)
    content = torch.randint(0, 256, (num_frames, *SHAPE), generator=generator, dtype=torch.uint8)
    rollout.obs["image"] = Frames(content, torch.randint(0, num_frames, (STEPS, ENVS), generator=generator))
    rollout.obs["vector"].copy_(torch.randn(STEPS, ENVS, 4, generator=generator))
    rollout.start.copy_(torch.rand(STEPS, ENVS, generator=generator) < 0.2)
    for x in (rollout.state, rollout.log_prob, rollout.value):
        x.copy_(torch.randn(x.shape, generator=generator))
    rollout.action.zero_()
    return rollout


def minibatch(rollout: Rollout) -> Minibatch:
    sequences = cut(rollout.start, 5)
    return gather(rollout, fake_targets(rollout), sequences, torch.arange(0, sequences.mask.shape[1], 2))


def stacked(rollout: Rollout) -> Rollout:
    """With an image for every step."""
    return replace(rollout, obs={key: x.stacked() if isinstance(x, Frames) else x for key, x in rollout.obs.items()})


@pytest.mark.parametrize("num_frames", [1, 5, 200])
def test_gathering_shows_every_step_its_frame(num_frames: int) -> None:
    rollout = some_rollout(tiny_agent(SHAPES, (3, 2)), num_frames)
    batch, wanted = minibatch(rollout), minibatch(stacked(rollout))
    image = batch.obs["image"]
    if isinstance(image, Frames):
        assert len(image.table) == len(image.number.unique()) == min(num_frames, len(image.table)) < len(image.number)
        image = image.stacked()
    else:
        assert num_frames == 200  # none repeats, so nothing is numbered
    assert torch.equal(image, wanted.obs["image"])
    assert torch.equal(batch.obs["vector"], wanted.obs["vector"])


def gradient(agent: Agent, batch: Minibatch) -> Tensor:
    learner = Learner(agent, PPOConfig(), total_steps=1, generator=torch.Generator())
    agent.zero_grad()
    learner.backward(batch, learner.ppo_loss(0))
    return torch.cat([p.grad.flatten().double() for p in agent.parameters() if p.grad is not None])


@pytest.mark.parametrize("core", ["none", "gru", "lstm"])
def test_gradients_are_those_of_encoding_every_step(core: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        agent = tiny_agent(SHAPES, (3, 2), core)
        rollout = some_rollout(agent, 5)
        once, each = gradient(agent, minibatch(rollout)), gradient(agent, minibatch(stacked(rollout)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert (once - each).abs().max() < 1e-10 * each.abs().max()


def test_gradients_in_bfloat16_survive_many_repetitions() -> None:
    """Of one frame that is shown 500 times. bfloat16 keeps 8 bits: added up in it, most of them would be lost."""
    agent = tiny_agent({"image": SHAPE}, (3, 2), "gru")
    torch.manual_seed(0)
    image = Frames(torch.randint(0, 256, (1, *SHAPE), dtype=torch.uint8), torch.zeros(500, dtype=torch.int64))
    state, packing = torch.randn(50, 8), torch.full((10,), 50)
    found = []
    for precision in (torch.float32, torch.bfloat16):
        agent.precision = precision
        agent.zero_grad()
        output = agent.unroll({"image": image}, state, packing, features=False)
        (output.value - 1).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in agent.encoder.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(found[0], found[1], dim=0) > 0.999
    assert float(found[1].norm() / found[0].norm()) == pytest.approx(1, abs=0.05)


# --- in a training -------------------------------------------------------------------------------------------------

GRID = tiny(
    total_steps=192,
    env={"id": "MortarMayhemB-Grid-v0", "num_workers": 2},
    model={"hidden_size": 16, "cnn_channels": [4, 4, 4]},
    train={"checkpoint_every": 1},
)
SPOTLIGHTS = GRID.replace(env={"id": "SearingSpotlights-v0"})


@pytest.mark.parametrize("double_buffering", ["off", "on"])
def test_a_training_depends_on_it_by_rounding_alone(double_buffering: str) -> None:
    config = GRID.replace(env={"double_buffering": double_buffering}, ppo={"learning_rate": 1e-4})
    for once, each in zip(*(train(config.replace(distinct_frames=x)) for x in ("on", "off")), strict=True):
        assert once["sequences/distinct_fraction"] <= 0.5
        assert once == pytest.approx(each, rel=1e-3, abs=1e-5)


def test_collected_rollouts_are_replayed() -> None:
    with Trainer(GRID) as trainer:
        collected = collect(trainer.collector, trainer.carry, 16)
        frames = collected.rollout.obs["visual_observation"]
        assert isinstance(frames, Frames) and len(frames.table) == len(frames.table.flatten(1).unique(dim=0))
        assert len(frames.table) <= 0.5 * frames.number.numel()
        assert max(worst_replay(trainer.agent, collected.rollout, cut(collected.rollout.start, 8))) < 1e-5


def test_where_frames_hardly_repeat_they_are_not_numbered_and_a_resumed_run_knows(tmp_path: Path) -> None:
    with Trainer(SPOTLIGHTS, tmp_path / "whole") as trainer:
        notes = [report.notes for report in trainer]
        assert isinstance(frames := trainer.storage.obs["obs"], Frames) and len(frames.table) == 17 * 4
    assert notes[0][0].endswith("of the frames differ, so every one is stored and encoded") and notes[1:] == [(), ()]
    with Trainer(SPOTLIGHTS, tmp_path / "parts") as trainer:
        next(trainer)
    with Trainer.resume(tmp_path / "parts") as trainer:
        assert [report.notes for report in trainer] == [(), ()]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
