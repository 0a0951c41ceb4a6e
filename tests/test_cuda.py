"""On a GPU: the same numbers as on the CPU, within the arithmetic's tolerance. Skipped where there is none."""

import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from configs_for_tests import tiny
from helpers import NVEC, fake_rollout, fake_targets, small_agent, starts, timeless, train, worst_replay
from test_gradients import loss_of_sequences

from ppo_tbptt.config import PPOConfig, Schedule
from ppo_tbptt.models import CORES, Agent
from ppo_tbptt.ppo.acting import Actor, reset_and_act
from ppo_tbptt.ppo.learner import Learner
from ppo_tbptt.ppo.sequences import cut
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.types import Rollout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    """Float32 is float32 here, and what a test changes is changed back."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before


def to_cuda(rollout: Rollout) -> Rollout:
    changes = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    moved = {name: x.to(CUDA) for name, x in changes.items() if isinstance(x, torch.Tensor)}
    return replace(rollout, obs={key: x.to(CUDA) for key, x in rollout.obs.items()}, **moved)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_replay_on_cuda_of_a_rollout_from_the_cpu(core: str, precision: torch.dtype, tolerance: float) -> None:
    """float32: sums in another order; bfloat16: see test_precision."""
    agent = small_agent(core, 2)
    rollout = fake_rollout(agent, starts())
    agent.to(CUDA).precision = precision
    assert max(worst_replay(agent, to_cuda(rollout), cut(rollout.start, 8), torch.arange(8))) < tolerance


@pytest.mark.parametrize("core", ["gru", "lstm", "ln_gru", "ln_lstm"])
def test_loss_and_gradients_equal_the_cpu(core: str) -> None:
    results = []
    for device in (torch.device("cpu"), CUDA):
        agent = small_agent(core, 2)
        rollout = fake_rollout(agent, starts())
        if device == CUDA:
            agent, rollout = agent.to(CUDA), to_cuda(rollout)
        loss = loss_of_sequences(agent.train(), rollout, 8)  # cuDNN has no gradients in eval mode
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))])
        results.append((loss.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("core", ["rnn_tanh", "rnn_relu", "gru", "ln_gru"])
@pytest.mark.parametrize("padded", [False, True])
def test_an_update_with_the_regulariser_equals_the_cpu(core: str, padded: bool) -> None:
    """The package's own recurrence takes cuDNN's place, as its gradients through time are needed."""
    config = PPOConfig(
        sequence_length=8,
        num_epochs=1,
        num_minibatches=1,
        jacobian_norm_coef=0.5,
        learning_rate=Schedule(initial=0.0),
        grad_clip="none",
    )
    results = []
    for device in (torch.device("cpu"), CUDA):
        agent = small_agent(core, 2)
        rollout = fake_rollout(agent, starts())
        if device == CUDA:
            agent, rollout = agent.to(CUDA), to_cuda(rollout)
        agent.core.padded = padded
        learner = Learner(agent, config, total_steps=1000, generator=torch.Generator())
        scalars = learner.update(rollout, fake_targets(rollout), 0, Timer()).scalars
        gradient = torch.cat([p.grad.flatten().cpu() for p in agent.parameters() if p.grad is not None])
        results.append((torch.tensor(scalars["loss/jacobian_norm"]), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("core", ["rnn_relu", "gru", "lstm", "ln_lstm"])
def test_padded_execution_equals_packed(core: str) -> None:
    agent = small_agent(core, 2)
    rollout = to_cuda(fake_rollout(agent, starts()))
    agent.to(CUDA).train()
    gradients = []
    for padded in (False, True):
        agent.core.padded = padded
        loss = loss_of_sequences(agent, rollout, 8)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()))]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_the_published_network_in_bfloat16() -> None:
    torch.manual_seed(0)
    agent = Agent({"obs": (84, 84, 3)}, (4,))
    frames = {"obs": torch.randint(0, 256, (8, 84, 84, 3), dtype=torch.uint8)}
    state = torch.randn(8, 512) / 2
    with torch.no_grad():
        want = agent.step(frames, state)
        agent.to(CUDA).precision = torch.bfloat16
        got = agent.step({"obs": frames["obs"].to(CUDA)}, state.to(CUDA))
    for name in ("logits", "value", "state_out"):
        torch.testing.assert_close(getattr(want, name), getattr(got, name).cpu(), rtol=0.05, atol=0.05)


def test_in_bfloat16_the_core_computes_in_float32_and_small_gradients_reach_it() -> None:
    """In float16, which autocast makes cuDNN use, gradients of 1e-9 would be 0."""
    agent = small_agent("gru").to(CUDA)
    agent.precision = torch.bfloat16
    state = torch.randn(4, agent.core.state_size, device=CUDA)
    output = agent.unroll({"obs": torch.randn(12, 5, device=CUDA)}, state, torch.tensor([4, 4, 3, 1]))
    (1e-9 * (output.logits.sum() + output.value.sum())).backward()
    for name, p in agent.core.named_parameters():
        assert p.grad is not None and (p.grad != 0).float().mean() > 0.5, name


def test_precision_decides_about_tf32_inside_the_agents_calls_alone() -> None:
    """Another agent in the process changes nothing for the first."""
    one, other = small_agent("gru").to(CUDA), small_agent("gru").to(CUDA)
    other.precision = torch.bfloat16
    with one.arithmetic():
        assert not torch.backends.cudnn.allow_tf32
        with other.arithmetic():
            assert torch.backends.cudnn.allow_tf32
        assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_captured_graph_acts_like_plain_calls_also_when_the_weights_have_changed(
    core: str, precision: torch.dtype
) -> None:
    agent = small_agent(core, 2).to(CUDA)
    agent.precision = precision
    actor = Actor(agent)
    for change in range(3):
        with torch.no_grad():
            for p in agent.parameters():
                p.mul_(1.0 + 0.1 * change)
        with agent.acting():
            after = torch.randn(4, agent.core.state_size, device=CUDA)
            for _ in range(3):
                obs = {"obs": torch.randn(4, 5, device=CUDA)}
                start, noise = torch.rand(4, device=CUDA) < 0.3, torch.rand(4, len(NVEC), device=CUDA)
                want, got = reset_and_act(agent, obs, after, start, noise), actor(obs, after, start, noise)
                for f in fields(want):
                    torch.testing.assert_close(getattr(got, f.name), getattr(want, f.name), rtol=1e-3, atol=1e-4)
                after = got.state_out.clone()
    assert actor.captured


def test_where_observations_are_stored_changes_nothing(tmp_path: Path) -> None:
    rows = []
    for storage in ("device", "host"):
        with Trainer(tiny(device="cuda", precision="float32", deterministic=True, storage=storage)) as trainer:
            assert (trainer.notes != []) == (storage == "host")
            rows.append([timeless(report.scalars) for report in trainer])
    assert rows[0] == rows[1]


def test_the_update_waits_for_the_gpu_twice(recwarn: pytest.WarningsRecorder) -> None:
    """At its beginning for where episodes start, and at its end for its figures; torch itself says where."""
    agent = small_agent("gru").to(CUDA)
    rollout = to_cuda(fake_rollout(small_agent("gru"), starts()))
    learner = Learner(agent, PPOConfig(sequence_length=8), total_steps=1000, generator=torch.Generator())
    targets = fake_targets(rollout)
    learner.update(rollout, targets, 0, Timer())  # libraries load, choose and allocate
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        learner.update(rollout, targets, 0, Timer())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "synchronizing" in str(w.message)]) <= 2


def test_double_buffering_on_cuda_changes_nothing_but_rounding() -> None:
    """Each half acts through a graph of its own, and its workers' memory is page-locked."""
    rows = []
    for setting in ("off", "on"):
        env = {"num_envs": 5, "num_workers": 2, "double_buffering": setting}
        config = tiny(device="cuda", precision="float32", env=env)
        with Trainer(config) as trainer:
            reports = [next(trainer), next(trainer)]
            assert torch.from_numpy(trainer.envs.host_memory).is_pinned()
            rows.append([timeless(report.scalars) for report in reports])
    for whole, halves in zip(*rows, strict=True):
        assert halves == pytest.approx(whole, rel=1e-2, abs=1e-4)


def test_a_resumed_run_on_cuda(tmp_path: Path) -> None:
    """20 iterations, interrupted after each third: within the arithmetic's tolerance, and bit for bit if asked."""
    for deterministic in (False, True):
        config = tiny(device="cuda", deterministic=deterministic, precision="float32", total_steps=64 * 20)
        folder = tmp_path / str(deterministic)
        train(config, folder / "whole")
        with Trainer(config, folder / "parts") as trainer:
            next(trainer)
            trainer.save()
        while trainer.iteration < 20:
            with Trainer.resume(folder / "parts") as trainer:
                for _ in range(min(3, 20 - trainer.iteration)):
                    next(trainer)
                trainer.save()
        whole, parts = (load_checkpoint(RunDir(folder / name).newest())["agent"] for name in ("whole", "parts"))
        tolerance = 0.0 if deterministic else 1e-3
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=tolerance, atol=tolerance)
