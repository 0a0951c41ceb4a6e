"""Equal frames are stored and encoded once, and everything comes out as if each were encoded by itself."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from fixture_envs import GivenLevels
from helpers import collect, fake_targets, tiny_agent, tracers, train, warmed_up, worst_replay
from test_resume import assert_equal_runs
from torch import Tensor

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.envs import VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.collector import empty_rollout
from ppo_tbptt.ppo.frames import CachedObservations, FeatureCache, FrameTable, Observations
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut, gather, only_counted
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Frames, Minibatch, Projected, Rollout

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
    assert frames.add(images(7), None).tolist() == [4]
    assert torch.equal(frames.frames, images(5, 5, 6, 5, 7)) and frames.num_distinct == 2


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [3000, 3000, 3000]), ("meta", [1024, 2048, 3000])])
def test_tables_grow_but_on_the_host(device: str, sizes: list[int]) -> None:
    """There, no memory is taken before it is written. "meta" stands for a GPU."""
    frames = FrameTable((1, 1, 3), 3000, torch.device(device))
    frames.clear(distinct=False)
    found = []
    for count in (1, 1024, 1024):
        frames.add(torch.zeros(count, 1, 1, 3, dtype=torch.uint8), None)
        assert frames.frames.shape == (len(frames.frames), 1, 1, 3) and frames.frames.dtype == torch.uint8
        assert frames.frames.device.type == device
        found.append(len(frames.memory))
    assert found == sizes and len(frames.frames) == 2049
    assert len(FrameTable((1, 1, 3), 1000, torch.device(device)).memory) == 1000


def test_each_frame_is_encoded_once_also_where_a_table_has_grown() -> None:
    frames, agent = table(3000), tiny_agent({"obs": SHAPE}, (2,))
    encoded: list[int] = []
    agent.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0]["obs"])))
    frames.memory = frames.memory[:2].clone()
    cache, number = FeatureCache(agent), torch.arange(2)
    with agent.acting():
        frames.add(images(1, 2), hashes(1, 2))
        first = cache.project("obs", frames, number).values[:2].clone()
        frames.add(images(3, 4, 5), hashes(3, 4, 5))
        projected = cache.project("obs", frames, torch.tensor([4, 0])).values
        assert torch.equal(cache.project("obs", frames, number).values, projected)
        assert encoded == [2, 4]  # padded to a power of two
        wanted = agent.project({"obs": images(1, 2, 3, 4, 5)})["obs"]
    assert torch.equal(frames.frames, images(1, 2, 3, 4, 5)) and frames.frames.dtype == torch.uint8
    assert len(frames.memory) == 5
    assert torch.equal(projected[:2], first)
    torch.testing.assert_close(projected[:5], wanted)


def questions(*levels: int) -> VectorEnv:
    """An environment for each of these levels, which it plays for ever: a colour, two black frames, a white one."""
    return VectorEnv("fixture_envs:fixture/DictToy-v0", num_envs=len(levels), levels=GivenLevels(levels), num_workers=0)


def test_an_evaluation_keeps_no_more_frames_than_it_may() -> None:
    """Here 4. All are forgotten where those of the two environments might be too many."""
    agent = tiny_agent({"image": (84, 84, 3), "vector": (2,)}, (2, 2))
    encoded: list[int] = []
    with questions(5, 5) as envs, agent.acting():
        envs.reset()
        observe = CachedObservations(envs, agent, 4)
        for new in ([1], [1], [], [1], [1], [1], []):
            hook = agent.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0]["image"])))
            encoded.clear()
            inputs, vector = observe(), torch.tensor(envs.obs["vector"])
            assert encoded == new
            hook.remove()
            wanted = agent.project({"image": torch.as_tensor(envs.obs["image"])})["image"]
            image = inputs["image"]
            assert isinstance(image, Projected)
            torch.testing.assert_close(image.values[image.number], wanted)
            envs.step(torch.zeros(2, 2, dtype=torch.int64))
            assert torch.equal(cast(Tensor, inputs["vector"]), vector), "what is returned is a copy"


def test_an_evaluation_observes_on_the_agents_device() -> None:
    with tracers(2) as envs:
        agent = tiny_agent({"obs": (3,)}, (3, 2)).to("meta")
        assert cast(Tensor, CachedObservations(envs, agent)()["obs"]).device.type == "meta"


@pytest.mark.parametrize("distinct", [None, False])
def test_what_each_environment_showed_at_each_step(distinct: bool | None) -> None:
    agent = tiny_agent({"image": (84, 84, 3), "vector": (2,)}, (2, 2))
    with questions(*range(5)) as envs:
        envs.reset()
        observations = Observations(envs, agent, agent.device, distinct)
        observations.begin(empty_rollout(agent, 6, 5))
        for t in range(6):
            shown = {key: torch.tensor(x) for key, x in envs.obs.items()}
            observations.store(t, slice(0, 5))
            envs.step(torch.zeros(5, 2, dtype=torch.int64))
            for n in range(5):
                found = observations.of(t, n)
                assert found.keys() == shown.keys() and all(torch.equal(x, shown[key][n]) for key, x in found.items())


def some_rollout(agent: Agent, num_frames: int, dtype: torch.dtype = torch.float32) -> Rollout:
    """Random observations, of which the images show ``num_frames`` frames."""
    generator = torch.Generator().manual_seed(0)
    rollout = empty_rollout(agent, STEPS, ENVS)
    content = torch.randint(0, 256, (num_frames, *SHAPE), generator=generator, dtype=torch.uint8)
    rollout.obs["image"] = Frames(content, torch.randint(0, num_frames, (STEPS, ENVS), generator=generator))
    rollout.obs["vector"].copy_(torch.randn(STEPS, ENVS, 4, generator=generator))
    rollout.start.copy_(torch.rand(STEPS, ENVS, generator=generator) < 0.2)
    for x in (rollout.state.rows, rollout.log_prob, rollout.value):
        x.copy_(torch.randn(x.shape, generator=generator))
    rollout.action.zero_()
    return rollout


def minibatch(rollout: Rollout) -> Minibatch:
    sequences = cut(rollout.start, 5)
    return gather(rollout, fake_targets(rollout), sequences, torch.arange(0, sequences.mask.shape[1], 2))


def stacked(rollout: Rollout) -> Rollout:
    """With an image for every step."""
    return replace(rollout, obs={key: x.stacked() if isinstance(x, Frames) else x for key, x in rollout.obs.items()})


@pytest.mark.parametrize("num_frames", [1, 5, STEPS * ENVS, 200])
def test_gathering_shows_every_step_its_frame(num_frames: int) -> None:
    rollout = some_rollout(tiny_agent(SHAPES, (3, 2)), num_frames)
    batch, wanted = minibatch(rollout), minibatch(stacked(rollout))
    image = batch.obs["image"]
    if isinstance(image, Frames):
        assert num_frames < STEPS * ENVS and len(image.table) == len(image.number.unique()) < len(image.number)
        image = image.stacked()
    else:
        assert num_frames >= STEPS * ENVS  # none need repeat, so nothing is numbered
    assert torch.equal(image, wanted.obs["image"])
    assert torch.equal(batch.obs["vector"], wanted.obs["vector"])


def test_steps_that_do_not_count_leave_the_others_their_frames() -> None:
    agent, counted = tiny_agent(SHAPES, (3, 2)), []
    rollout = some_rollout(agent, 5)
    for each in (rollout, stacked(rollout)):
        sequences = warmed_up(each.start, 5)
        batch = gather(each, fake_targets(each), sequences, torch.arange(0, sequences.mask.shape[1], 2))
        counted.append(only_counted(batch))
        sizes, in_loss = batch.sequences_per_step, batch.in_loss
        of_all = agent.unroll(batch.obs, batch.state, sizes).features
        features = agent.unroll(batch.obs, batch.state, sizes, in_loss=in_loss).features
        assert features is not None and of_all is not None and in_loss is not None
        assert torch.equal(features, of_all[in_loss])
    once, wanted = counted
    assert torch.equal(once.obs["image"].stacked(), wanted.obs["image"])
    assert torch.equal(once.obs["vector"], wanted.obs["vector"])
    assert len(wanted.obs["image"]) == len(wanted.action) == sequences.counted[::2].sum()


def gradient(agent: Agent, batch: Minibatch) -> Tensor:
    learner = Learner(agent, PPOConfig(), total_steps=1, generator=torch.Generator())
    agent.zero_grad()
    learner.backward(batch, learner.ppo_loss(0))
    return torch.cat([p.grad.flatten().double() for p in agent.parameters() if p.grad is not None])


@pytest.mark.parametrize("core", ["none", "gru", "lstm", "ln_gru"])
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
