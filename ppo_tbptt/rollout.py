"""Acting: T steps of N environments into a :class:`~ppo_tbptt.types.Rollout`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ppo_tbptt.envs import Episode, LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import sample
from ppo_tbptt.timing import Timer
from ppo_tbptt.types import Carry, Obs, Rollout


@dataclass(slots=True, kw_only=True)
class Collected:
    """What came of one call of :func:`collect`."""

    rollout: Rollout
    carry: Carry
    episodes: list[Episode]
    """Those that ended during the rollout, in order of time, then environment."""


@dataclass(slots=True)
class _FinalObservations:
    """The observations after truncations, kept until their values are computed in one batch."""

    t: list[int] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    obs: list[dict[str, np.ndarray]] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)

    def add(self, t: int, envs: VectorEnv, truncated: np.ndarray, after: Tensor) -> None:
        for n in np.flatnonzero(truncated).tolist():
            self.t.append(t)
            self.n.append(n)
            self.obs.append({key: x[n].copy() for key, x in envs.final_obs.items()})
            self.state.append(after[n])

    def value(self, agent: Agent) -> Float[Tensor, "E"]:
        obs = {key: torch.from_numpy(np.stack([o[key] for o in self.obs])).to(agent.device) for key in self.obs[0]}
        return agent.step(obs, torch.stack(self.state))[1]


def begin(envs: VectorEnv, seeds: LevelSeeds, agent: Agent) -> Carry:
    """Reset all environments; every one is at the start of an episode."""
    envs.reset(seeds.current)
    seeds.advance(np.ones(envs.num_envs, dtype=np.bool_))
    return Carry(
        obs={key: torch.from_numpy(x).to(agent.device, copy=True) for key, x in envs.obs.items()},
        start=torch.ones(envs.num_envs, dtype=torch.bool, device=agent.device),
        state=agent.core.initial_state(envs.num_envs),
    )


def collect(
    envs: VectorEnv,
    seeds: LevelSeeds,
    agent: Agent,
    carry: Carry,
    storage: Rollout,
    noise: Float[Tensor, "T N A"],
    timer: Timer,
) -> Collected:
    """Fill ``storage`` with T steps that go on from ``carry``.

    ``noise`` (uniform on [0, 1), on the CPU) decides the actions, so that nothing depends on how the environments
    are spread over workers. Dropout does not act here. At the end ``next_value`` is the value of each step's true
    successor: 0 where terminated, V(final observation, state after the step) where truncated, and the next step's
    value otherwise, the last one from the carried observation and state.
    """
    with agent.acting():
        return _collect(envs, seeds, agent, carry, storage, noise, timer)


def _collect(
    envs: VectorEnv, seeds: LevelSeeds, agent: Agent, carry: Carry, storage: Rollout, noise: Tensor, timer: Timer
) -> Collected:
    device = agent.device
    nvec = agent.action_nvec
    noise = noise.to(device)
    current: Obs = {key: torch.from_numpy(x) for key, x in envs.obs.items()}  # views of shared memory
    reward = np.full((storage.num_steps, storage.num_envs), np.nan, dtype=np.float32)
    terminated = np.zeros(reward.shape, dtype=np.bool_)
    truncated = np.zeros(reward.shape, dtype=np.bool_)
    finals = _FinalObservations()
    episodes: list[Episode] = []

    start, after = carry.start, carry.state
    for key, x in carry.obs.items():
        storage.obs[key][0].copy_(x)
    for t in range(storage.num_steps):
        with timer("inference"):
            state = agent.reset_state(after, start)
            logits, value, after = agent.step({key: x[t] for key, x in storage.obs.items()}, state)
            action, log_prob = sample(logits, noise[t], nvec)
            storage.start[t] = start
            storage.state[t] = state
            storage.action[t] = action
            storage.log_prob[t] = log_prob
            storage.value[t] = value
            host_action = action.cpu().numpy()
        with timer("environments"):
            outcome = envs.step(host_action, seeds.current)
        reward[t], terminated[t], truncated[t] = outcome.reward, outcome.terminated, outcome.truncated
        end = outcome.terminated | outcome.truncated
        if end.any():
            seeds.advance(end)
            episodes += outcome.episodes
            if outcome.truncated.any():
                finals.add(t, envs, outcome.truncated, after)
        with timer("transfer"):
            start = torch.from_numpy(end).to(device)
            if t + 1 < storage.num_steps:
                for key, x in current.items():
                    storage.obs[key][t + 1].copy_(x)

    carry = Carry(obs={key: x.to(device, copy=True) for key, x in current.items()}, start=start, state=after)
    storage.reward.copy_(torch.from_numpy(reward))
    storage.terminated.copy_(torch.from_numpy(terminated))
    storage.truncated.copy_(torch.from_numpy(truncated))
    storage.next_value[:-1] = storage.value[1:]
    storage.next_value[-1] = agent.step(carry.obs, agent.reset_state(after, start))[1]
    if finals.t:
        storage.next_value[finals.t, finals.n] = finals.value(agent)
    storage.next_value[storage.terminated] = 0.0
    return Collected(rollout=storage, carry=carry, episodes=episodes)
