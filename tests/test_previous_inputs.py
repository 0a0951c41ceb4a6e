"""What the agent is fed at a step: the action and reward of the step before, and zeros where an episode starts."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from fixture_envs import GivenLevels, tracer_length
from helpers import collect, train
from test_resume import assert_equal_runs
from torch import Tensor

from ppo_tbptt.config import ConfigError, EnvConfig, ModelConfig
from ppo_tbptt.envs import EnvError, FaultBudget, LevelSeeds, PreviousInputs, VectorEnv, make_env
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.collector import RolloutCollector
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.watch.environment import remote_env, watched_env
from ppo_tbptt.watch.recording import record_episode

BOTH = ("previous_action", "previous_reward")
TRACER, FAULTY = "fixture_envs:fixture/Tracer-v0", "fixture_envs:fixture/Faulty-v0"
STEPS, ENVS = 11, 3


class Odd(gym.Env[Any, Any]):
    """Choices that count from 5 and from -1."""

    observation_space = gym.spaces.Dict({"z": gym.spaces.Box(-1, 1, (1,)), "a": gym.spaces.Box(-1, 1, (2,))})
    action_space = gym.spaces.MultiDiscrete([2, 3], start=[5, -1])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return {"a": np.zeros(2), "z": np.zeros(1)}, {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return {"a": np.ones(2), "z": np.ones(1)}, float(action[0] + action[1] / 4), False, False, {}


class Taken(Odd):
    observation_space = gym.spaces.Dict({"previous_reward": gym.spaces.Box(-1, 1, (1,))})


for _kind in (Odd, Taken):
    if f"previous/{_kind.__name__}-v0" not in gym.registry:
        gym.register(f"previous/{_kind.__name__}-v0", entry_point=f"test_previous_inputs:{_kind.__name__}")


def agent_for(obs_shapes: Mapping[str, tuple[int, ...]], nvec: tuple[int, ...], previous: tuple[str, ...]) -> Agent:
    """One that heeds what happened before."""
    torch.manual_seed(0)
    sizes = {"previous_action": (sum(nvec),), "previous_reward": (1,)}
    chosen = {name: name in previous for name in BOTH}
    model = ModelConfig.model_validate({"hidden_size": 16, "vector_hidden_sizes": (8,), **chosen})
    agent = Agent({**obs_shapes, **{name: sizes[name] for name in previous}}, nvec, model=model)
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 2.0)
    return agent


def before(nvec: tuple[int, ...], action: Any = None, reward: float = 0.0) -> dict[str, list[float]]:
    """What is to be observed of an action, counted from 0, and a reward; of none at an episode's start."""
    branches = [] if action is None else [int(choice) for choice in action]
    one_hot = [float(branches[k : k + 1] == [choice]) for k, n in enumerate(nvec) for choice in range(n)]
    return {"previous_action": one_hot, "previous_reward": [float(np.float32(reward))]}


def test_the_environments_own_observations_come_first_and_actions_count_from_0() -> None:
    env = make_env("test_previous_inputs:previous/Odd-v0", previous=BOTH)
    shapes = {"a": (2,), "z": (1,), "previous_action": (5,), "previous_reward": (1,)}
    assert {key: (array.shape, array.dtype) for key, array in env.spec.obs.items()} == {
        key: (shape, "float32") for key, shape in shapes.items()
    }
    assert list(env.spec.obs) == list(shapes)
    obs = env.reset(0)
    assert {key: obs[key].tolist() for key in BOTH} == before((2, 3))
    for action in ([1, 2], [0, 1]):
        obs, *_ = env.step(np.array(action))
        assert {key: obs[key].tolist() for key in BOTH} == before((2, 3), action, 5 + action[0] + (action[1] - 1) / 4)
        assert obs["a"].tolist() == [1, 1]


def test_a_name_that_is_taken_is_one_line() -> None:
    env_id = "test_previous_inputs:previous/Taken-v0"
    with pytest.raises(
        EnvError, match=r"^previous/Taken-v0: has an observation 'previous_reward' of its own"
    ) as caught:
        make_env(env_id, previous=BOTH)
    assert "\n" not in str(caught.value)
    make_env(env_id, previous=["previous_action"]).close()


def vector_env(num_workers: int = 0, two_groups: bool = False, previous: tuple[str, ...] = BOTH) -> VectorEnv:
    levels = LevelSeeds(7, ENVS, 10, 50)
    groups: dict[str, Any] = {"num_workers": num_workers, "two_groups": two_groups}
    return VectorEnv(TRACER, num_envs=ENVS, levels=levels, previous=previous, **groups)


@pytest.mark.parametrize(("name", "other"), [BOTH, BOTH[::-1]])
def test_the_core_is_fed_with_them_as_they_are(name: str, other: str) -> None:
    """Unless the environment has an observation of such a name by itself, which is one like any other."""
    agent = agent_for({"obs": (3,), other: (4,)}, (3, 2), (name,))
    obs = {key: torch.randn(2, *shape) for key, shape in agent.obs_shapes.items()}
    features = agent.unroll(obs, torch.zeros(2, agent.core.state_size), torch.tensor([2])).features
    assert features is not None and features.shape == (2, 8 + 8 + obs[name].shape[1])
    assert torch.equal(features[:, agent.encoder.columns[name]], obs[name])


@pytest.mark.parametrize("previous", [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize("workers", [(0, False), (2, True)])
def test_rollouts_equal_a_plain_loop_over_the_bare_environment(
    previous: tuple[str, ...], workers: tuple[int, bool]
) -> None:
    """Two in a row, in which episodes are terminated, truncated, and run over the end of the first."""
    nvec, levels = (3, 2), LevelSeeds(7, ENVS, 10, 50)
    agent = agent_for({"obs": (3,)}, nvec, previous)
    bare = [gym.make(TRACER.split(":")[1], disable_env_checker=True) for _ in range(ENVS)]
    own = [env.reset(seed=levels.begin(n))[0] for n, env in enumerate(bare)]
    known = [before(nvec)] * ENVS
    truncations = 0
    with vector_env(*workers, previous=previous) as envs:
        collector = RolloutCollector(envs, agent)
        carry = collector.begin()
        for number in range(2):
            result = collect(collector, carry, STEPS, number)
            rollout, carry = result.rollout, result.carry
            assert rollout.obs.keys() == {"obs", *previous}
            for t in range(STEPS):
                fed = {key: torch.tensor([row[key] for row in known]) for key in previous}
                fed["obs"] = torch.from_numpy(np.stack(own))
                for key, x in fed.items():
                    assert torch.equal(rollout.obs[key][t], x), (number, t, key)
                with torch.no_grad():
                    after = agent.step(fed, rollout.state[t]).state_out
                for n, env in enumerate(bare):
                    action = rollout.action[t, n].tolist()
                    own[n], reward, terminated, truncated, _ = env.step(np.array(action))
                    known[n] = before(nvec, action, float(reward))
                    if truncated:
                        final = {key: torch.tensor([known[n][key]]) for key in previous}
                        final["obs"] = torch.from_numpy(own[n])[None]
                        with torch.no_grad():
                            value = float(agent.step(final, after[n : n + 1]).value)
                        assert float(rollout.next_value[t, n]) == pytest.approx(value, abs=1e-6)
                        truncations += 1
                    if terminated or truncated:
                        own[n], _ = env.reset(seed=levels.begin(n))
                        known[n] = before(nvec)
    assert truncations > 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_after_a_failure_nothing_is_known_and_before_it_what_led_there(num_workers: int) -> None:
    levels, faults = GivenLevels([10, 11], [20, 21]), FaultBudget(3)
    options = {"level": 11, "length": 9, "step_at": 3}
    agent = agent_for({"obs": (2,)}, (2,), BOTH)
    kwargs: dict[str, Any] = {"options": options, "faults": faults, "num_workers": num_workers, "previous": BOTH}
    with VectorEnv(FAULTY, num_envs=2, levels=levels, **kwargs) as envs:
        collector = RolloutCollector(envs, agent)
        rollout = collect(collector, collector.begin(), 5).rollout
    assert rollout.truncated[:, 1].tolist() == [False, False, True, False, False]
    for n, starts in enumerate(([0], [0, 3])):
        for t in range(5):
            known = before((2,)) if t in starts else before((2,), rollout.action[t - 1, n], 0.25)
            assert {key: rollout.obs[key][t, n].tolist() for key in BOTH} == known
    with torch.no_grad():
        last = {key: x[2, 1:] for key, x in rollout.obs.items()}
        after = agent.step(last, rollout.state[2, 1:]).state_out
        assert float(rollout.next_value[2, 1]) == pytest.approx(float(agent.step(last, after).value), abs=1e-6)


def returns(agent: Agent, level: int, see: Callable[[Any, Any, float], dict[str, Tensor]]) -> float:
    """Of a greedy episode on the bare Tracer; ``see`` makes what the agent is fed."""
    env = gym.make(TRACER.split(":")[1], disable_env_checker=True)
    obs, _ = env.reset(seed=level)
    state, action, reward, total = agent.core.initial_state(1), None, 0.0, 0.0
    for _ in range(tracer_length(level)):
        with torch.no_grad():
            output = agent.step(see(obs, action, reward), state)
        state, action = output.state_out, [int(x.argmax()) for x in output.logits[0].split((3, 2))]
        obs, got, *_ = env.step(np.array(action))
        reward = float(got)
        total += reward
    return total


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_equals_a_plain_loop_over_the_bare_environment(num_workers: int) -> None:
    agent, levels = agent_for({"obs": (3,)}, (3, 2), BOTH), range(20, 32)

    def see(obs: Any, action: Any, reward: float) -> dict[str, Tensor]:
        known = {key: torch.tensor([x]) for key, x in before((3, 2), action, reward).items()}
        return {"obs": torch.from_numpy(obs)[None], **known}

    def forget(obs: Any, action: Any, reward: float) -> dict[str, Tensor]:
        return see(obs, None, 0.0)

    outcome = evaluate(agent, EnvConfig(id=TRACER), seeds=levels, repeats=1, greedy=True, num_workers=num_workers)
    actual = [row["return"] for row in outcome.per_episode]
    assert actual == [returns(agent, level, see) for level in levels]
    assert actual != [returns(agent, level, forget) for level in levels]


IMAGE = tiny(
    env={"id": "reference_envs:reference/Image-v0"},
    model={"cnn_channels": [3, 4, 5], "previous_action": True, "previous_reward": True},
    ppo={"value_gradient_scale": 0.5},
    aux={"reconstruction_coef": 0.1},
    train={"checkpoint_every": 1, "eval_every": 2},
    total_steps=192,
)


def test_resumed_runs_are_exact_and_their_agents_play_elsewhere(tmp_path: Path) -> None:
    assert all("loss/reconstruction" in row for row in train(IMAGE, tmp_path / "whole"))
    with Trainer(IMAGE, tmp_path / "parts") as trainer:
        next(trainer)
    for _ in range(2):
        with Trainer.resume(tmp_path / "parts") as trainer:
            assert trainer.notes == []
            next(trainer)
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")

    policy = Policy.load(tmp_path / "parts")
    assert not any("decoder" in name for name in policy.agent.state_dict())
    with watched_env(IMAGE.env, policy.agent.previous) as env:
        recording = record_episode(policy, env, seed=200_003)
    with remote_env(IMAGE.env, policy.agent.previous) as env:
        assert record_episode(policy, env, seed=200_003).rewards == recording.rewards
    wrapped = PreviousInputs(gym.make(IMAGE.env.id.split(":")[1]), policy.agent.previous)
    obs, _ = wrapped.reset(seed=200_003)
    policy.reset(seed=200_003)
    for action, reward in zip(recording.actions, recording.rewards, strict=False):
        chosen = policy.act(obs)
        assert chosen.tolist() == action.tolist()
        obs, actual, *_ = wrapped.step(chosen)
        assert actual == reward


def test_environments_that_are_handed_in_must_have_them(tmp_path: Path) -> None:
    config = tiny(model={"previous_reward": True}, env={"id": TRACER, "num_envs": ENVS})
    with pytest.raises(
        ConfigError, match=r"^model\.previous_reward: true, but .* no observation 'previous_reward'; must"
    ):
        Trainer(config, tmp_path / "run", envs=vector_env(previous=BOTH[:1]))
    assert not (tmp_path / "run").exists()
    with Trainer(config, envs=vector_env()) as trainer:
        assert trainer.agent.previous == ("previous_reward",)
        assert next(trainer).scalars["policy/approx_kl"] == pytest.approx(0, abs=1e-2)
