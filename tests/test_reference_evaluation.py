"""Evaluations equal a plain loop over level seeds and repeats, one environment and one episode at a time."""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fixture_envs
import gymnasium as gym
import memory_gym  # noqa: F401 (registers its tasks)
import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import timeless, tiny_agent, train
from recorded_envs import Dictated
from scipy import stats

import ppo_tbptt.envs.toy  # noqa: F401 (registers the toys)
from ppo_tbptt.config import Config, EnvConfig
from ppo_tbptt.envs import EnvError, WorkerError, make_env
from ppo_tbptt.evaluation.evaluate import evaluate
from ppo_tbptt.models import Agent
from ppo_tbptt.run.checkpoint import load_checkpoint
from ppo_tbptt.training.trainer import Trainer

TRACER, MORTAR = "fixture_envs:fixture/Tracer-v0", "MortarMayhem-Grid-v0"
Row = dict[str, float]
Info = dict[str, Any]


# --- the reference ---------------------------------------------------------------------------------------------------


def reference(
    agent: Agent,
    env: EnvConfig,
    *,
    seeds: list[int],
    repeats: int,
    greedy: bool = False,
    sampling_seed: int = 0,
    max_steps: int = 16_384,
    forget_every: int | None = None,
) -> dict[str, Any]:
    """What `asdict(evaluate(...))` must be."""
    agent.eval()
    rows: list[Row] = []
    for seed in sorted(seeds):
        for repeat in range(repeats):
            noise = None if greedy else np.random.default_rng((sampling_seed, seed, repeat))
            row = play(agent, env, seed, noise, max_steps, forget_every)
            rows.append({"seed": seed, "repeat": repeat, **row})
    headline, largest = headline_of(env.id)
    proportions = {"success", headline} if largest == 1.0 else {"success"}
    names = {name for row in rows for name in row} - {"seed", "repeat", "capped"}
    return {
        "env_id": env.id,
        "episodes": len(seeds) * repeats,
        "seeds": seeds,
        "repeats": repeats,
        "greedy": greedy,
        "sampling_seed": sampling_seed,
        "max_steps": max_steps,
        "forget_every": forget_every,
        "capped": sum(row["capped"] for row in rows),
        "headline": headline,
        "measures": {name: over_levels(rows, name, proportion=name in proportions) for name in names},
        "per_episode": rows,
    }


@torch.no_grad()
def play(
    agent: Agent,
    config: EnvConfig,
    seed: int,
    noise: np.random.Generator | None,
    max_steps: int,
    forget_every: int | None,
) -> Row:
    """One episode; actions are drawn with ``noise``, or are the most probable ones without."""
    env = gym.make(config.id.split(":")[-1], disable_env_checker=True)
    obs, _ = env.reset(seed=seed, options=dict(config.options) or None)
    limit = min(max_steps, config.max_episode_steps or max_steps)
    rewards: list[float] = []
    state = torch.zeros(1, agent.core.state_size)
    while True:
        if forget_every is not None and len(rewards) % forget_every == 0:
            state = torch.zeros(1, agent.core.state_size)
        arrays = obs if isinstance(obs, Mapping) else {"obs": obs}
        projected = agent.project({key: torch.as_tensor(array)[None] for key, array in arrays.items()})
        y, state = agent.core(agent.core.join_inputs([*projected.values()])[None], state)
        logits = agent.heads(y[0])[0][0].double().numpy()
        action = choose(logits, agent.action_nvec, noise)
        discrete = isinstance(env.action_space, gym.spaces.Discrete)
        obs, reward, terminated, truncated, info = env.step(action[0] if discrete else np.array(action))
        rewards.append(float(reward))
        if terminated or truncated or len(rewards) == limit:
            return {
                "return": sum(rewards),
                "length": len(rewards),
                "capped": int(not terminated and len(rewards) == max_steps),
                **task_measures(env, rewards, info),
            }


def choose(logits: np.ndarray, nvec: tuple[int, ...], noise: np.random.Generator | None) -> list[int]:
    """An action of each branch: where the cumulative probabilities first exceed a uniform number."""
    uniform = [0.0] * len(nvec) if noise is None else noise.random(len(nvec), dtype=np.float32).tolist()
    action = []
    for number, branch in zip(uniform, np.split(logits, np.cumsum(nvec)[:-1]), strict=True):
        p = np.exp(branch - branch.max())
        cumulative = np.cumsum(p / p.sum())
        above = [k for k in range(len(p)) if number < cumulative[k]]
        action.append(int(branch.argmax()) if noise is None else above[0] if above else len(p) - 1)
    return action


def headline_of(env_id: str) -> tuple[str, float | None]:
    """What decides "best", and its largest value."""
    if env_id == MORTAR:
        return "commands_completed", 1.0
    return getattr(gym.make(env_id.split(":")[-1], disable_env_checker=True).unwrapped, "headline", ("return", None))


def task_measures(env: gym.Env[Any, Any], rewards: list[float], info: Info) -> Row:
    """From the rewards of an episode and the info of its last step."""
    task: Any = env.unwrapped
    if env.spec is not None and env.spec.id == MORTAR:
        return mortar_measures(task.num_commands, rewards, info)
    if "success" in info:
        return {"success": float(info["success"])}
    return {"success": 0.0} if task.headline[0] == "success" else {}


def mortar_measures(commands: int, rewards: list[float], info: Info) -> Row:
    """Here the agent is paid for each command that it has done, and for nothing else.

    The environment calls it a success when the last command fails, too; then there was no pay in the last step.
    """
    paid = [reward > 0 for reward in rewards]
    if not info:  # cut
        return {"success": 0.0, "commands_completed": sum(paid) / commands}
    failed_last = bool(info["success"]) and not paid[-1]
    completed = info["commands_completed"] * commands - failed_last
    return {"success": float(info["success"] and not failed_last), "commands_completed": completed / commands}


def over_levels(rows: list[Row], name: str, *, proportion: bool) -> dict[str, Any]:
    """Mean and 95 % interval over the means of the levels that report a measure."""
    levels = sorted({row["seed"] for row in rows if name in row})
    means = np.array([np.mean([row[name] for row in rows if row["seed"] == level and name in row]) for level in levels])
    return {"mean": means.sum() / len(means), "ci95": interval(means, proportion=proportion)}


def interval(means: np.ndarray, *, proportion: bool) -> list[float] | None:
    if len(means) == 1:
        return None
    if means.min() < means.max():
        rng = np.random.default_rng(0)
        found = stats.bootstrap((means,), np.mean, n_resamples=10_000, method="percentile", rng=rng)
        return [found.confidence_interval.low, found.confidence_interval.high]
    if proportion and means[0] in (0.0, 1.0):  # Wilson's, which is this where all n trials have one outcome
        z, n = float(stats.norm.ppf(0.975)), len(means)
        return [n / (n + z**2), 1.0] if means[0] else [0.0, z**2 / (n + z**2)]
    return [means[0], means[0]]


def assert_equal(found: Any, expected: Any, where: str = "evaluation") -> None:
    """Same keys, equal integers and texts, floats to 1e-9."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i in range(len(expected)):
            assert_equal(found[i], expected[i], f"{where}/{i}")
    elif isinstance(expected, float):
        assert type(found) is float and found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert type(found) is type(expected) and found == expected, where


# --- evaluate --------------------------------------------------------------------------------------------------------


def make_agent(env_id: str, **changes: Any) -> Agent:
    """An agent with a mind of its own: its actions are far from equally probable, and depend on its state."""
    env = make_env(env_id)
    env.close()
    shapes = {key: array.shape for key, array in env.spec.obs.items()}
    agent = tiny_agent(shapes, env.spec.action_nvec, seed=3, **changes)
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 3.0)
    if env_id == TRACER:
        weight = agent.encoder.get_parameter("parts.obs.layers.0.weight").data
        weight[:, 0] /= 100  # level seeds are large
        weight[:, 1] = 0  # how often an environment was used before is none of the agent's business
    return agent


def shuffled(first: int, count: int) -> list[int]:
    return random.Random(0).sample(range(first, first + count), count)


@dataclass
class Case:
    """A task, the changes of its config, those of the agent, and how it is evaluated."""

    id: str = TRACER
    env: dict[str, Any] = field(default_factory=dict)
    agent: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)

    def of(self, evaluation: Callable[..., Any], **changes: Any) -> Any:
        how = {"seeds": shuffled(100, 20), "repeats": 2, **self.how, **changes}
        return evaluation(make_agent(self.id, **self.agent), EnvConfig(id=self.id, **self.env), **how)


LSTM = {"core": "lstm", "num_layers": 2}
IMAGES, DICTS = "fixture_envs:fixture/ImageToy-v0", "fixture_envs:fixture/DictToy-v0"


def mortar(*command_count: int) -> dict[str, Any]:
    options = {"explosion_delay": [2], "command_show_duration": [1], "command_count": list(command_count)}
    return {"id": MORTAR, "env": {"options": options}}


CASES = {
    "vectors, more episodes than fit at once": Case(how={"seeds": shuffled(100, 30), "repeats": 3}),
    "another sampling seed": Case(how={"sampling_seed": 5}),
    "greedy": Case(how={"seeds": shuffled(100, 70), "repeats": 1, "greedy": True}),
    "forgets every third step": Case(how={"forget_every": 3}),
    "cut": Case(how={"max_steps": 5}),
    "shorter episodes": Case(env={"max_episode_steps": 5}),
    "shorter episodes, cut there": Case(env={"max_episode_steps": 5}, how={"max_steps": 5}),
    "longer episodes by options": Case(env={"options": {"min_length": 12, "max_length": 20}}),
    "one level": Case(how={"seeds": [123], "repeats": 70}),
    "two layers of LSTM that forget, trained with dropout": Case(
        agent={**LSTM, "dropout": 0.5}, how={"forget_every": 2}
    ),
    "a level twice": Case(how={"seeds": [123, 456, 123], "repeats": 1}),
    "no memory": Case(agent={"core": "none"}),
    "own time limit": Case("ppo_tbptt/PocMemory-v0"),
    "images": Case(IMAGES, env={"options": {"delay": 3}}),
    "images and vectors": Case(DICTS, agent=LSTM),
    "success is reported by some episodes": Case(
        "recorded_envs:recorded/Unjudged-v0", env={"options": {"longest": 20}, "max_episode_steps": 12}
    ),
    "Mortar Mayhem, one command": Case(**mortar(1), how={"seeds": shuffled(0, 30), "repeats": 1}),
    "Mortar Mayhem": Case(**mortar(1, 2), how={"seeds": shuffled(30, 34)}),
    "Mortar Mayhem, cut": Case(**mortar(3), how={"seeds": shuffled(0, 20), "repeats": 1, "max_steps": 11}),
    "Mortar Mayhem, none of which is done": Case(MORTAR, how={"seeds": shuffled(0, 5), "repeats": 1, "max_steps": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_is_the_plain_loop_by_any_number_of_workers(name: str) -> None:
    expected = CASES[name].of(reference)
    for num_workers in (0, 1, 3) if "more episodes" in name else (0,):
        assert_equal(asdict(CASES[name].of(evaluate, num_workers=num_workers)), expected)


def test_levels_are_played_three_times_by_default_and_disturbances_told_of_steps_and_episodes() -> None:
    told: list[tuple[Any, ...]] = []

    def disturb(state: torch.Tensor, age: np.ndarray, episodes: Any) -> torch.Tensor:
        told.append((age.dtype, age.tolist(), list(episodes)))
        return state

    assert evaluate(make_agent(TRACER), EnvConfig(id=TRACER), seeds=[100], num_workers=0, disturb=disturb).episodes == 3
    length, playing = fixture_envs.tracer_length(100), [(100, repeat) for repeat in range(3)]
    assert told == [(np.int64, [t] * 3, playing) for t in range(length)]


def test_by_default_there_is_a_process_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: [])
    assert evaluate(make_agent(TRACER), EnvConfig(id=TRACER), seeds=[100], repeats=1).episodes == 1


def test_progress_is_told_after_every_step() -> None:
    told: list[int] = []
    CASES["another sampling seed"].of(evaluate, seeds=range(100, 104), progress=told.append, num_workers=0)
    lengths = [fixture_envs.tracer_length(seed) for seed in range(100, 104) for _ in "12"]
    assert told == [sum(length <= step for length in lengths) for step in range(1, max(lengths) + 1)]


def test_an_environment_that_hangs_ends_it() -> None:
    hangs = EnvConfig(id="fixture_envs:fixture/Faulty-v0", options={"hang_at": 2}, step_timeout=0.5)
    with pytest.raises(WorkerError, match="answer"):
        evaluate(tiny_agent({"obs": (2,)}, (2,)), hangs, seeds=[1], repeats=1, num_workers=1)


# --- the trainer's evaluations ---------------------------------------------------------------------------------------


def by_config(agent: Agent, config: Config) -> dict[str, Any]:
    """The reference evaluation that a config asks for."""
    train = config.train
    return reference(
        agent,
        config.env,
        seeds=[train.eval_first_seed + i for i in range(train.eval_num_seeds)],
        repeats=train.eval_repeats,
        greedy=train.eval_greedy,
        max_steps=train.eval_max_steps,
    )


SETTINGS: dict[str, Any] = {"eval_first_seed": 300_005, "eval_num_seeds": 7, "eval_repeats": 3}
SETTINGS |= {"eval_greedy": True, "eval_max_steps": 5}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_of_evaluations_reaches_them(name: str) -> None:
    config = tiny(env={"options": {"num_show_steps": 3}, "max_episode_steps": 14}, train={"eval_num_seeds": 6})
    changed = config.replace(train={name: SETTINGS[name]})
    with Trainer(changed) as trainer:
        assert_equal(asdict(trainer.evaluate()), by_config(trainer.agent, changed))
        assert by_config(trainer.agent, changed)["per_episode"] != by_config(trainer.agent, config)["per_episode"]


def test_arguments_of_an_evaluation_come_before_the_settings() -> None:
    with Trainer(tiny()) as trainer:
        found = trainer.evaluate(seeds=[7, 5], repeats=1, greedy=True, sampling_seed=2, max_steps=6, forget_every=2)
        how = {"repeats": 1, "greedy": True, "sampling_seed": 2, "max_steps": 6, "forget_every": 2}
        assert_equal(asdict(found), reference(trainer.agent, trainer.config.env, seeds=[7, 5], **how))


ONES = EnvConfig(id="ppo_tbptt/ProbeConstant-v0")


@pytest.mark.parametrize(("shapes", "nvec"), [({"obs": (2,)}, (2,)), ({"obs": (1,)}, (3,))])
def test_another_environments_agent_is_refused(shapes: dict[str, tuple[int, ...]], nvec: tuple[int, ...]) -> None:
    with pytest.raises(EnvError, match=r"^ppo_tbptt/ProbeConstant-v0: observations .* don't fit this agent"):
        evaluate(tiny_agent(shapes, nvec), ONES, seeds=[1, 2], num_workers=0)


def test_a_return_that_is_1_everywhere_is_no_proportion() -> None:
    agent = tiny_agent({"obs": (1,)}, (2,))
    assert evaluate(agent, ONES, seeds=[1, 2], num_workers=0).measures["return"].ci95 == (1.0, 1.0)


def test_what_is_logged_is_the_evaluation_of_that_iterations_weights() -> None:
    """Other iterations log none, and what is trained does not depend on it."""
    config = tiny(
        total_steps=5 * 64,
        ppo={"learning_rate": 0.03},
        train={"eval_every": 2, "eval_num_seeds": 6, "eval_repeats": 2, "eval_first_seed": 150_000},
    )
    alone = train(config.replace(train={"eval_every": 0}))
    logged: dict[int, dict[str, float]] = {}
    with Trainer(config) as trainer:
        for report, without in zip(trainer, alone, strict=True):
            due = report.iteration % 2 == 0
            measures = by_config(trainer.agent, config)["measures"] if due else {}
            expected = {f"eval/{name}": measure["mean"] for name, measure in measures.items()}
            assert_equal(timeless(report.row()), {**without, **expected})
            assert ("time/evaluation_seconds" in report.scalars) == due
            assert 0 < report.scalars.get("time/evaluation_seconds", 1.0) < 60
            logged[report.iteration] = expected
    assert set(logged[2]) == {"eval/return", "eval/length", "eval/success"}
    assert logged[2] != logged[4]  # the weights have changed


def test_best_holds_the_weights_of_the_best_evaluation(tmp_path: Path) -> None:
    """By the headline measure, the first of equals, also where the run is resumed in between."""
    Dictated.script, Dictated.begun = [0.25, 0.75, 0.5, 0.75, 0.25, 1.0, 0.5], 0
    config = tiny(
        total_steps=7 * 8,
        env={"id": "recorded_envs:recorded/Dictated-v0", "num_envs": 2, "num_seeds": Dictated.held_out},
        ppo={"rollout_steps": 4, "sequence_length": 4, "learning_rate": 0.1},
        train={"eval_every": 1, "eval_first_seed": Dictated.held_out, "eval_num_seeds": 2, "eval_repeats": 1}
        | {"checkpoint_every": 1},
    )
    weights: list[dict[str, torch.Tensor]] = []
    best: list[int] = []

    def train(trainer: Trainer, iterations: int) -> None:
        with trainer:
            for _ in range(iterations):
                report = next(trainer)
                assert report.scalars["eval/success"] == Dictated.script[report.iteration - 1]
                assert report.scalars["eval/return"] == 1 - report.scalars["eval/success"]
                weights.append({name: x.clone() for name, x in trainer.agent.state_dict().items()})
                saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
                best.append(saved["iteration"])
                assert saved["best"] == trainer.checkpoints.best == max(Dictated.script[: report.iteration])
                assert all(torch.equal(x, weights[best[-1] - 1][name]) for name, x in saved["agent"].items())

    train(Trainer(config, tmp_path / "run"), 3)
    train(Trainer.resume(tmp_path / "run"), 4)
    assert best == [1, 2, 2, 2, 2, 6, 6]
    assert any(not torch.equal(x, weights[1][name]) for name, x in weights[2].items())
