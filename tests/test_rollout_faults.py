"""collect where environments fail or are odd: whatever is lost, what comes out is a rollout like any other."""

from typing import Any

import pytest
import torch
from helpers import collect, tiny_agent, worst_replay

from ppo_tbptt.envs import FaultBudget, LevelSeeds, VectorEnv
from ppo_tbptt.ppo.collector import RolloutCollector
from ppo_tbptt.ppo.sequences import cut

STEPS, ENVS, LENGTH = 24, 4, 6
LEVELS, BAD = range(10, 26), 13


def level_seeds() -> LevelSeeds:
    return LevelSeeds(1, ENVS, LEVELS.start, len(LEVELS))


class Simulation:
    """What should become of four environments of which those that play ``bad`` fail, maybe with all of a process's."""

    def __init__(self, fault: str, num_processes: int) -> None:
        (self.kind, self.at) = next(iter(FAULTS[fault].items()))
        self.bad = LEVELS if fault == "every step" else {BAD}
        size = ENVS // num_processes
        self.processes = [range(first, first + size) for first in range(0, ENVS, size)]
        self.levels, self.level, self.t, self.faults = level_seeds(), [0] * ENVS, [0] * ENVS, 0
        for n in range(ENVS):
            self.begin(n)

    def begin(self, n: int) -> None:
        """A new episode, of the next level that can be reset."""
        self.level[n], self.t[n] = self.levels.begin(n), 0
        if self.kind == "reset_at" and self.level[n] == BAD:
            self.faults += 1
            self.begin(n)

    def step(self) -> tuple[list[tuple[int, int]], list[int]]:
        """The (t, level) that each row is stepped from, and the rows that fail."""
        place = list(zip(self.t, self.level, strict=True))
        failing = [n for n in range(ENVS) if place[n][0] == self.at - 1 and place[n][1] in self.bad]
        self.faults += len(failing)
        if self.kind in ("kill_at", "hang_at"):
            down = [process for process in self.processes if set(process) & set(failing)]
            self.faults += len(down) - len(failing)
            failing = [n for process in down for n in process]
        for n in range(ENVS):
            self.t[n] += 1
            if n in failing or self.t[n] == LENGTH:
                self.begin(n)
        return place, failing


FAULTS = {
    "step": {"step_at": 4},
    "first step": {"step_at": 1},
    "last step": {"step_at": LENGTH},
    "reward": {"reward_at": 3},
    "every step": {"step_at": 1, "level": -1},
    "reset": {"reset_at": 0},
    "kill": {"kill_at": 5},
    "hang": {"hang_at": 2},
}


@pytest.mark.parametrize(
    ("fault", "num_workers", "two_groups"),
    [
        *((fault, workers, False) for fault in ("step", "reset") for workers in (0, 1, 2)),
        *(("first step", 2, False), ("last step", 0, False), ("reward", 0, False), ("every step", 0, False)),
        *(("kill", 1, False), ("kill", 2, False), ("hang", 2, False)),
        *(("step", 0, True), ("reset", 1, True), ("kill", 1, True)),
    ],
)
def test_every_row_of_a_rollout_with_failures(fault: str, num_workers: int, two_groups: bool) -> None:
    agent, budget = tiny_agent({"obs": (2,)}, (2,), "lstm"), FaultBudget(1000)
    simulation = Simulation(fault, max(1, num_workers) * (2 if two_groups else 1))
    levels, failures, texts = level_seeds(), 0, 0
    kwargs: dict[str, Any] = {"levels": levels, "faults": budget, "step_timeout": 2, "two_groups": two_groups}
    kwargs["options"] = {"level": BAD, "length": LENGTH, **FAULTS[fault]}
    with VectorEnv("fixture_envs:fixture/Faulty-v0", num_envs=ENVS, num_workers=num_workers, **kwargs) as envs:
        collector = RolloutCollector(envs, agent)
        carry = collector.begin()
        for number in range(2):
            state_out, fresh = carry.state, carry.start
            result = collect(collector, carry, STEPS, number)
            rollout, carry = result.rollout, result.carry
            for t in range(STEPS):
                place, failing = simulation.step()
                failures += len(failing)
                obs = torch.tensor(place, dtype=torch.float32)
                assert torch.equal(rollout.obs["obs"][t], obs), t
                assert torch.equal(rollout.start[t], fresh) and fresh.tolist() == [where[0] == 0 for where in place]
                state_in = agent.reset_state(state_out, rollout.start[t])
                torch.testing.assert_close(rollout.state[t], state_in)
                with torch.no_grad():
                    output = agent.step({"obs": obs}, state_in)
                    state_out = output.state_out
                    bootstrap = agent.step({"obs": obs}, state_out).value
                torch.testing.assert_close(rollout.value[t], output.value)
                chosen = output.logits.log_softmax(1).gather(1, rollout.action[t])
                torch.testing.assert_close(rollout.log_prob[t], chosen)
                failed = torch.tensor([n in failing for n in range(ENVS)])
                assert torch.equal(rollout.truncated[t], failed)
                assert rollout.terminated[t].tolist() == [
                    n not in failing and place[n][0] + 1 == LENGTH for n in range(ENVS)
                ]
                assert rollout.reward[t].tolist() == [0.0 if n in failing else 0.25 for n in range(ENVS)]
                torch.testing.assert_close(rollout.next_value[t, failed], bootstrap[failed])
                fresh = rollout.terminated[t] | rollout.truncated[t]
            end = rollout.terminated | rollout.truncated
            assert (rollout.next_value[rollout.terminated] == 0).all()
            assert torch.equal(rollout.next_value[:-1][~end[:-1]], rollout.value[1:][~end[:-1]])
            assert not any(
                x.isnan().any() for x in (rollout.state.rows, rollout.value, rollout.reward, rollout.next_value)
            )
            for length in (1, 5, None):  # with unchanged weights the update recomputes what the rollout computed
                assert max(worst_replay(agent, rollout, cut(rollout.start, length))) < 1e-5
            assert result.cut_episodes == int(rollout.truncated.sum())
            assert len(result.episodes) == int(rollout.terminated.sum())
            texts += len(result.faults)
            assert envs.obs["obs"].tolist() == [list(x) for x in zip(simulation.t, simulation.level, strict=True)]
            torch.testing.assert_close(carry.state, state_out)
    assert levels.state_dict() == simulation.levels.state_dict()
    assert budget.count == texts == simulation.faults > 1
    assert (failures > 1) == (fault != "reset")
