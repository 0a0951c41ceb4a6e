"""collect, seen through a tracer whose observations say where they come from."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from fixture_envs import tracer_length, tracer_reward, tracer_terminates
from helpers import tiny_agent, tracers, worst_replay
from torch import Tensor

from ppo_tbptt.envs import LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.acting import Actor, reset_and_act
from ppo_tbptt.ppo.collector import RolloutCollector, empty_rollout
from ppo_tbptt.ppo.sequences import cut
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Carry

STEPS, ENVS = 29, 4


def tracer_agent(core: str = "lstm") -> Agent:
    return tiny_agent({"obs": (3,)}, (3, 2), core, 2)


def noise(seed: int = 0) -> Tensor:
    return torch.rand(STEPS, ENVS, 2, generator=torch.Generator().manual_seed(seed))


def test_a_rollout_lies_on_the_agents_device() -> None:
    rollout = empty_rollout(tracer_agent().to("meta"), 2, 3)
    others = {getattr(rollout, f.name) for f in fields(rollout) if f.name not in ("obs", "state")}
    others = {x.device.type for x in (*others, rollout.state.rows, rollout.state.row)}
    assert {rollout.obs["obs"].device.type} == others == {"meta"}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("two_groups", [False, True])
def test_every_field_of_every_row(num_workers: int, two_groups: bool) -> None:
    """Two rollouts in a row; the tracer's observation is (level seed, episode, t) and its reward encodes the action."""
    agent = tracer_agent()
    with tracers(ENVS, num_workers, two_groups=two_groups) as envs:
        levels = LevelSeeds(7, ENVS, 10, 50)
        collector = RolloutCollector(envs, agent)
        carry: Carry = collector.begin()
        place = [(levels.begin(n), 0, 0) for n in range(ENVS)]
        after = agent.core.initial_state(ENVS)
        fresh = [True] * ENVS
        ended = 0
        for number in range(2):
            result = collector.collect(carry, empty_rollout(agent, STEPS, ENVS), noise(number), Timer())
            rollout, carry = result.rollout, result.carry
            for t in range(STEPS):
                obs = torch.tensor(place, dtype=torch.float32)
                assert torch.equal(rollout.obs["obs"][t], obs)
                assert rollout.start[t].tolist() == fresh
                state = torch.where(torch.tensor(fresh)[:, None], agent.core.initial_state(ENVS), after)
                torch.testing.assert_close(rollout.state[t], state)
                with torch.no_grad():
                    output = agent.step({"obs": obs}, state)
                after = output.state_out
                torch.testing.assert_close(rollout.value[t], output.value)
                for n, (seed, episode, step) in enumerate(place):
                    action = rollout.action[t, n].tolist()
                    branches = output.logits[n].split((3, 2))
                    chosen = [float(b.log_softmax(0)[a]) for b, a in zip(branches, action, strict=True)]
                    assert rollout.log_prob[t, n].tolist() == pytest.approx(chosen, abs=1e-5)
                    assert float(rollout.reward[t, n]) == tracer_reward(step, action)
                    end = step + 1 == tracer_length(seed)
                    terminated = end and tracer_terminates(seed)
                    assert bool(rollout.terminated[t, n]) == terminated
                    assert bool(rollout.truncated[t, n]) == (end and not terminated)
                    if terminated:
                        assert float(rollout.next_value[t, n]) == 0.0
                    elif end:  # V(final observation, state after the step)
                        final = torch.tensor([[seed, episode, step + 1]], dtype=torch.float32)
                        with torch.no_grad():
                            bootstrap = agent.step({"obs": final}, after[n : n + 1]).value
                        assert float(rollout.next_value[t, n]) == pytest.approx(float(bootstrap), abs=1e-5)
                    elif t + 1 < STEPS:
                        assert rollout.next_value[t, n] == rollout.value[t + 1, n]
                    fresh[n] = end
                    if end:
                        ended += 1
                        place[n] = (levels.begin(n), episode + 1, 0)
                    else:
                        place[n] = (seed, episode, step + 1)
            obs = torch.tensor(place, dtype=torch.float32)
            assert torch.equal(torch.as_tensor(envs.obs["obs"]), obs)
            assert carry.start.tolist() == fresh
            torch.testing.assert_close(carry.state, after)
            with torch.no_grad():  # the last value uses the carried state, reset where an episode starts
                last = agent.step({"obs": obs}, agent.reset_state(after, carry.start)).value
            alive = ~torch.tensor(fresh)
            torch.testing.assert_close(rollout.next_value[-1][alive], last[alive])
            assert not any(
                x.isnan().any() for x in (rollout.state.rows, rollout.value, rollout.reward, rollout.next_value)
            )
            count = sum(int((rollout.terminated | rollout.truncated)[:, n].sum()) for n in range(ENVS))
            assert len(result.episodes) == count
        assert ended > 20


def test_replay_of_collected_rollouts() -> None:
    """The replay test on the real path, with a carried state that is not zero."""
    agent = tracer_agent()
    with tracers(ENVS) as envs:
        collector = RolloutCollector(envs, agent)
        carry = collector.collect(collector.begin(), empty_rollout(agent, STEPS, ENVS), noise(0), Timer()).carry
        rollout = collector.collect(carry, empty_rollout(agent, STEPS, ENVS), noise(1), Timer()).rollout
    assert rollout.state[0].abs().max() > 0.01
    for length in (1, 3, 16, None):
        assert max(worst_replay(agent, rollout, cut(rollout.start, length))) < 1e-5


def test_one_half_steps_while_the_agent_acts_for_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tracer_agent()
    done: list[str] = []
    with tracers(ENVS, 1, two_groups=True) as envs:
        owners: dict[str, Any] = {"step": agent, "send": envs, "receive": envs}
        for name, call in {name: getattr(owner, name) for name, owner in owners.items()}.items():

            def watched(*args: Any, call: Any = call, name: str = name) -> Any:
                done.append(name if name == "step" else f"{name} {args[-1]}")
                return call(*args)

            monkeypatch.setattr(owners[name], name, watched)
        collector = RolloutCollector(envs, agent)
        collector.collect(collector.begin(), empty_rollout(agent, 2, ENVS), noise()[:2], Timer())
    first = ["step", "send 0", "step", "send 1"]
    assert done[:12] == [*first, "receive 0", "step", "send 0", "receive 1", "step", "send 1", "receive 0", "receive 1"]


def test_dropout_does_not_act_while_acting() -> None:
    agent = tiny_agent({"obs": (3,)}, (3, 2), num_layers=2, dropout=0.9)
    agent.train()
    values = []
    for _ in range(2):
        with tracers(ENVS) as envs:
            collector = RolloutCollector(envs, agent)
            values.append(
                collector.collect(collector.begin(), empty_rollout(agent, STEPS, ENVS), noise(), Timer()).rollout.value
            )
        agent.train()
    assert torch.equal(*values)


def test_acting_goes_on_where_no_graph_can_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = tracer_agent()
    actor = Actor(agent)
    monkeypatch.setattr(actor, "_captures", True)  # as on a GPU; here there is none to capture on
    inputs = ({"obs": torch.rand(4, 3)}, torch.rand(4, agent.core.state_size), torch.rand(4) < 0.5, torch.rand(4, 2))
    with agent.acting():
        with pytest.warns(UserWarning, match="acting without a CUDA graph, slower"):
            first = actor(*inputs)
        second, plain = actor(*inputs), reset_and_act(agent, *inputs)
    assert not actor.captured
    for output in (first, second):
        assert torch.equal(output.action, plain.action) and torch.equal(output.state_out, plain.state_out)


@pytest.mark.parametrize("env_id", ["fixture_envs:fixture/ImageToy-v0", "fixture_envs:fixture/DictToy-v0"])
def test_images_stay_bytes_and_channels_last(env_id: str) -> None:
    with VectorEnv(env_id, num_envs=2, levels=LevelSeeds(0, 2, 0, 10)) as envs:
        shapes = {key: array.shape for key, array in envs.spec.obs.items()}
        agent = tiny_agent(shapes, envs.spec.action_nvec)
        kept = empty_rollout(agent, 5, 2)
        collector = RolloutCollector(envs, agent)
        draws = torch.rand(5, 2, len(envs.spec.action_nvec))
        rollout = collector.collect(collector.begin(), kept, draws, Timer()).rollout
    frames = rollout.obs["image" if "Dict" in env_id else "obs"].stacked()
    assert frames.dtype == torch.uint8
    assert frames.shape == (5, 2, 84, 84, 3)
    first = frames[rollout.start]
    assert (first.flatten(0, 2).float().mean(0)[:2].sum() == 255) and (first[..., 2] == 0).all()  # one pure colour each
