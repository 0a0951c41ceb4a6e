"""collect where environments fail or are odd: whatever is lost, what comes out is a rollout like any other."""

import os
import signal
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_agent, worst_replay
from torch import Tensor

from ppo_tbptt.envs import LevelSeeds, Restarts, VectorEnv, WorkerError
from ppo_tbptt.envs.workers.fleet import Fleet
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.collector import Collected, Sampler, empty_rollout
from ppo_tbptt.ppo.sequences import cut
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Carry, Rollout

STEPS, ENVS, LENGTH = 24, 4, 6
BAD = 13


def new_agent() -> Agent:
    return tiny_agent({"obs": (2,)}, (2,), "lstm")


def vector(
    num_workers: int, restarts: Restarts | None = None, length: int = LENGTH, num_envs: int = ENVS, **kwargs: Any
) -> VectorEnv:
    options = {"level": BAD, "length": length, **kwargs.pop("options", {})}
    return VectorEnv(
        "fixture_envs:fixture/Faulty-v0",
        num_envs=num_envs,
        num_workers=num_workers,
        options=options,
        restarts=restarts or Restarts(100),
        **kwargs,
    )


def level_seeds(num_envs: int = ENVS, first_env: int = 0) -> LevelSeeds:
    return LevelSeeds(1, num_envs, 10, 16, first_env)


def run(sampler: Sampler, carry: Carry, number: int = 0) -> Collected:
    noise = torch.rand(STEPS, ENVS, 1, generator=torch.Generator().manual_seed(number))
    storage = empty_rollout(
        {"obs": ((2,), torch.float32)},
        num_steps=STEPS,
        num_envs=ENVS,
        num_branches=1,
        state_size=sampler.agent.core.state_size,
        device=torch.device("cpu"),
    )
    return sampler.collect(carry, storage, noise, Timer())


class Simulation:
    """What should become of four environments of which the one that plays BAD fails, with all of its worker's."""

    def __init__(self, num_workers: int, options: dict[str, int]) -> None:
        size = ENVS // max(1, num_workers)
        self.workers = [range(first, first + size) for first in range(0, ENVS, size)]
        self.step_at, self.reset_fails = next(iter(options.values())), "reset_at" in options
        self.seeds = level_seeds()
        self.level, self.t = [-1] * ENVS, [0] * ENVS
        self.restarts = 0
        self.begin(list(range(ENVS)))

    def begin(self, rows: list[int]) -> None:
        """New episodes in ``rows``, again where a worker cannot reset one of them."""
        while rows:
            current = self.seeds.current
            self.seeds.advance(np.isin(np.arange(ENVS), rows))
            again = []
            for worker in self.workers:
                if worker[0] in rows:
                    if self.reset_fails and BAD in current[list(worker)]:
                        again += worker
                        self.restarts += 1
                    else:
                        for n in worker:
                            self.level[n], self.t[n] = int(current[n]), 0
            rows = again

    def step(self) -> tuple[list[int], list[tuple[int, int]]]:
        """The rows that were cut after a step at least, and the (level, t) that each row is stepped from."""
        cuts, todo, ended = [], list(self.workers), [False] * ENVS
        while todo:
            lost = []
            following = self.seeds.current
            for worker in todo:
                ends = [n for n in worker if self.t[n] + 1 == LENGTH]
                fails = [n for n in worker if not self.reset_fails and self.level[n] == BAD]
                if any(self.t[n] + 1 == self.step_at for n in fails) or (
                    self.reset_fails and any(following[n] == BAD for n in ends)
                ):
                    lost.append(worker)
                    self.restarts += 1
                else:
                    for n in ends:
                        ended[n] = True
            rows = [n for worker in lost for n in worker]
            cuts += [n for n in rows if self.t[n] > 0]
            self.begin(rows)
            todo = lost
        place = list(zip(self.level, self.t, strict=True))
        following = self.seeds.current
        self.seeds.advance(np.array(ended))
        for n in range(ENVS):
            self.level[n], self.t[n] = (int(following[n]), 0) if ended[n] else (self.level[n], self.t[n] + 1)
        return cuts, place


FAULTS = {
    "step": {"step_at": 4},
    "first step": {"step_at": 1},
    "reward": {"reward_at": 3},
    "reset": {"reset_at": 0},
    "kill": {"kill_at": 5},
    "hang": {"hang_at": 2},
}


CASES = [
    *(("step", 0), ("step", 1), ("step", 2), ("first step", 0), ("first step", 2), ("reward", 0)),
    *(("reset", 0), ("reset", 1), ("reset", 2), ("kill", 1), ("kill", 2), ("hang", 1), ("hang", 2)),
]


@pytest.mark.parametrize(
    ("fault", "num_workers", "halves"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if case[1] < 2],
)
def test_every_row_of_a_rollout_with_failures(fault: str, num_workers: int, halves: bool) -> None:
    """Two halves fail apart, as two workers do: each half here is one worker's, or of this process."""
    agent, restarts = new_agent(), Restarts(100)
    simulation = Simulation(2 if halves else num_workers, FAULTS[fault])
    size = ENVS // 2 if halves else ENVS
    parts = [
        (
            vector(num_workers, restarts, options=FAULTS[fault], step_timeout=1, num_envs=size),
            level_seeds(size, first_env),
        )
        for first_env in range(0, ENVS, size)
    ]
    fleet = Fleet(parts)
    with closing(fleet):
        sampler = Sampler(fleet, agent)
        carry = sampler.begin()
        cut_somewhere = 0
        for number in range(2):
            carried = carry
            result = run(sampler, carry, number)
            rollout, carry = result.rollout, result.carry
            after = carried.state
            truncated = torch.zeros(STEPS, ENVS, dtype=torch.bool)
            cut_episodes, previous = 0, None
            for t in range(STEPS):
                before = list(zip(simulation.t, simulation.level, strict=True))  # what was seen first at t
                cuts, place = simulation.step()
                cut_episodes += len(cuts)
                if previous is not None:
                    truncated[t - 1, cuts] = True
                    values = value_of(agent, before, after, torch.tensor([where[0] == 0 for where in before]))
                    torch.testing.assert_close(rollout.next_value[t - 1, cuts], values[cuts])
                previous = place
                expected = torch.tensor([[step, level] for level, step in place], dtype=torch.float32)
                assert torch.equal(rollout.obs["obs"][t], expected), t
                assert rollout.start[t].tolist() == [step == 0 for _, step in place]
                state = agent.reset_state(after, rollout.start[t])
                torch.testing.assert_close(rollout.state[t], state)
                with torch.no_grad():
                    output = agent.step({"obs": expected}, state)
                after = output.state_out
                torch.testing.assert_close(rollout.value[t], output.value)
                chosen = output.logits.log_softmax(1).gather(1, rollout.action[t])
                torch.testing.assert_close(rollout.log_prob[t], chosen)
                assert rollout.terminated[t].tolist() == [step + 1 == LENGTH for _, step in place]
            assert torch.equal(rollout.truncated, truncated)
            check_ends(rollout)
            check_replay(agent, rollout)
            assert result.cut_episodes == cut_episodes
            assert len(result.episodes) == int(rollout.terminated.sum())
            assert carry.obs["obs"].tolist() == [
                [t, level] for t, level in zip(simulation.t, simulation.level, strict=True)
            ]
            torch.testing.assert_close(carry.state, after)
            cut_somewhere += cut_episodes
        assert fleet.seed_counts() == simulation.seeds.state()
        assert restarts.count == simulation.restarts > 1
        assert cut_somewhere > 0 or fault == "first step"


def value_of(agent: Agent, place: list[tuple[int, int]], state: Tensor, start: Tensor) -> Tensor:
    obs = torch.tensor(place, dtype=torch.float32)
    with torch.no_grad():
        return agent.step({"obs": obs}, agent.reset_state(state, start)).value


def check_ends(rollout: Rollout) -> None:
    """What holds for any rollout."""
    end = rollout.terminated | rollout.truncated
    assert torch.equal(rollout.start[1:], end[:-1])
    assert not (rollout.terminated & rollout.truncated).any()
    assert (rollout.next_value[rollout.terminated] == 0).all()
    goes_on = ~end[:-1]
    assert torch.equal(rollout.next_value[:-1][goes_on], rollout.value[1:][goes_on])
    assert not any(x.isnan().any() for x in (rollout.state, rollout.value, rollout.reward, rollout.next_value))


def check_replay(agent: Agent, rollout: Rollout) -> None:
    """With unchanged weights the update recomputes what the rollout computed."""
    for length in (1, 5, None):
        assert max(worst_replay(agent, rollout, cut(rollout.start, length))) < 1e-5


def test_a_worker_killed_between_rollouts() -> None:
    """Its episodes begin anew at once, and the rows of the others are what they would have been, bit for bit."""
    agent = new_agent()
    results: list[Collected] = []
    for killed in (False, True):
        seeds = level_seeds()
        with vector(2, length=7) as envs:
            sampler = Sampler(Fleet([(envs, seeds)]), agent)
            carry = sampler.begin()
            carry = run(sampler, carry, 1).carry
            if killed:
                os.kill(envs.worker_pids[1], signal.SIGKILL)
            results.append(run(sampler, carry, 2))
    calm, rollout = results[0].rollout, results[1].rollout
    for one, other in [
        (calm.obs["obs"], rollout.obs["obs"]),
        *((getattr(calm, name), getattr(rollout, name)) for name in ("state", "action", "log_prob", "next_value")),
    ]:
        assert torch.equal(one[:, :2], other[:, :2])
    assert results[0].cut_episodes == 0 and results[0].faults == []
    assert rollout.start[0, 2:].all() and (rollout.obs["obs"][0, 2:, 0] == 0).all()
    assert results[1].cut_episodes == 2 - int(calm.start[0, 2:].sum())
    assert not rollout.truncated.any()
    assert results[1].faults == ["worker 1 (environments 2 to 3) was killed by SIGKILL; restarted (1 of at most 100)"]
    check_ends(rollout)
    check_replay(agent, rollout)


@pytest.mark.parametrize("t", [0, 1, 2, STEPS - 1])
def test_the_step_that_is_lost_may_be_any(t: int) -> None:
    """All episodes fail in step ``t``, and end with the one before it: here, or in the rollout before."""
    agent, seeds = new_agent(), level_seeds()
    before = 2
    with vector(0, options={"step_at": before + t + 1, "level": -1}, length=1000) as envs:
        sampler = Sampler(Fleet([(envs, seeds)]), agent)
        storage = {"obs": ((2,), torch.float32)}
        first = empty_rollout(
            storage,
            num_steps=before,
            num_envs=ENVS,
            num_branches=1,
            state_size=agent.core.state_size,
            device=torch.device("cpu"),
        )
        carry = sampler.collect(sampler.begin(), first, torch.rand(before, ENVS, 1), Timer()).carry
        result = run(sampler, carry)
    rollout = result.rollout
    expected = torch.zeros(STEPS, ENVS, dtype=torch.bool)
    if t > 0:
        expected[t - 1] = True
    later = range(2 * t + before, STEPS, t + before)  # where they fail again
    expected[[k - 1 for k in later]] = True
    assert torch.equal(rollout.truncated, expected)
    assert result.cut_episodes == ENVS * (1 + len(later))
    check_ends(rollout)
    check_replay(agent, rollout)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_beyond_the_limit(num_workers: int) -> None:
    agent, seeds = new_agent(), level_seeds()
    with vector(num_workers, Restarts(3), options={"step_at": 2, "level": -1}) as envs:
        sampler = Sampler(Fleet([(envs, seeds)]), agent)
        carry = sampler.begin()
        with pytest.raises(WorkerError, match=r"(?s)Traceback.*as told.*after 3 restarts"):
            run(sampler, carry)


@pytest.mark.parametrize(
    ("length", "limit", "ends"), [(1, None, STEPS), (1000, None, 0), (1000, 5, STEPS // 5), (1000, 1, STEPS)]
)
def test_odd_episodes(length: int, limit: int | None, ends: int) -> None:
    """Of one step; longer than the rollout; without an end of their own."""
    agent, seeds = new_agent(), level_seeds()
    with vector(0, length=length, max_episode_steps=limit) as envs:
        sampler = Sampler(Fleet([(envs, seeds)]), agent)
        carry = sampler.begin()
        result = run(sampler, carry)
    rollout = result.rollout
    end = rollout.truncated if limit else rollout.terminated
    assert end.sum(0).tolist() == [ends] * ENVS and len(result.episodes) == ends * ENVS
    assert not (rollout.terminated if limit else rollout.truncated).any()
    if limit:
        assert (rollout.next_value[end] != 0).all()
        assert {episode.length for episode in result.episodes} == {limit}
    check_ends(rollout)
    check_replay(agent, rollout)
