"""Acting: T steps of N environments into a :class:`~ppo_tbptt.types.Rollout`."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_tbptt.acting import Actor
from ppo_tbptt.envs import Episode, LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.timing import Timer
from ppo_tbptt.types import Carry, Obs, Rollout


@dataclass(slots=True, kw_only=True)
class Collected:
    """What came of one call of :func:`collect`."""

    rollout: Rollout
    carry: Carry
    episodes: list[Episode]
    """Those that ended during the rollout, in order of time, then environment."""
    cut_episodes: int
    """Those that a failure ended after at least one step; they are not among ``episodes``."""
    faults: list[str]
    """A text for each restart of environments since the last rollout."""


@dataclass(slots=True)
class _Cuts:
    """Episodes that a failure cut: where, and the value of what would have come next."""

    count: int = 0
    t: list[int] = field(default_factory=list)
    rows: list[Bool[Tensor, "N"]] = field(default_factory=list)
    next_value: list[Float[Tensor, "N"]] = field(default_factory=list)

    def add(self, t: int, rows: Bool[Tensor, "N"], value: Float[Tensor, "N"]) -> None:
        """Step t was lost in ``rows``, where an episode was under way; ``value`` is that of t's observations."""
        self.count += int(rows.sum())
        if t > 0:  # else the last completed step is the previous rollout's, which counted on this very value
            self.t.append(t - 1)
            self.rows.append(rows)
            self.next_value.append(value.clone())

    def mark(self, storage: Rollout) -> None:
        """Truncate the cut episodes at their last completed steps."""
        for t, rows, value in zip(self.t, self.rows, self.next_value, strict=True):
            storage.truncated[t] |= rows
            storage.next_value[t] = torch.where(rows, value, storage.next_value[t])


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
            self.state.append(after[n].clone())

    def value(self, agent: Agent) -> Float[Tensor, "E"]:
        obs = {key: torch.from_numpy(np.stack([o[key] for o in self.obs])).to(agent.device) for key in self.obs[0]}
        return agent.step(obs, torch.stack(self.state))[1]


def begin(envs: VectorEnv, seeds: LevelSeeds, agent: Agent) -> Carry:
    """Reset all environments; every one is at the start of an episode."""
    lost = envs.reset(seeds.current)
    seeds.advance(np.ones(envs.num_envs, dtype=np.bool_))
    _restart(envs, seeds, lost)
    return Carry(
        obs={key: torch.from_numpy(x).to(agent.device, copy=True) for key, x in envs.obs.items()},
        start=torch.ones(envs.num_envs, dtype=torch.bool, device=agent.device),
        state=agent.core.initial_state(envs.num_envs),
    )


def _restart(envs: VectorEnv, seeds: LevelSeeds, lost: np.ndarray | None) -> None:
    """Begin new episodes where they are lost, each try with the next level seeds."""
    while lost is not None:
        current = seeds.current
        seeds.advance(lost)
        lost = envs.restart(current)


def collect(
    envs: VectorEnv,
    seeds: LevelSeeds,
    actor: Actor,
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

    Where environments fail in step t and restart, their episodes end, as truncated, with step t - 1; the values of
    step t's observations, which the agent had seen by then, are its successors'. Step t is then the first one of new
    episodes, decided with the same noise. All other environments take step t once.

    Raises:
        WorkerError: an environment or a worker failed, and no restarts are left.
    """
    with actor.agent.acting():
        return _collect(envs, seeds, actor, carry, storage, noise, timer)


def _at(storage: Rollout, t: int, device: torch.device) -> Obs:
    """The observations of step t on ``device``: views, where they are stored there."""
    return {key: x[t].to(device, non_blocking=True) for key, x in storage.obs.items()}


def _rows(mask: np.ndarray, x: Tensor) -> Tensor:
    """``mask`` [N] for ``torch.where`` with ``x`` [N, ...]."""
    return torch.from_numpy(mask).view(-1, *[1] * (x.dim() - 1))


def _collect(
    envs: VectorEnv, seeds: LevelSeeds, actor: Actor, carry: Carry, storage: Rollout, noise: Tensor, timer: Timer
) -> Collected:
    agent = actor.agent
    device = agent.device
    noise = noise.to(device)
    current: Obs = {key: torch.from_numpy(x) for key, x in envs.obs.items()}  # views of shared memory
    reward = np.full((storage.num_steps, storage.num_envs), np.nan, dtype=np.float32)
    terminated = np.zeros(reward.shape, dtype=np.bool_)
    truncated = np.zeros(reward.shape, dtype=np.bool_)
    finals, cuts = _FinalObservations(), _Cuts()
    episodes: list[Episode] = []

    start, carried = carry.start, carry.state
    for key, x in carry.obs.items():
        storage.obs[key][0].copy_(x)
    for t in range(storage.num_steps):
        with timer("inference"):
            obs = _at(storage, t, device)
            decision = actor(obs, carried, start, noise[t])
            decision.store(storage, t, start)
            host_action = decision.action.cpu().numpy()
        with timer("environments"):
            outcome = envs.step(host_action, seeds.current)
            while outcome.lost is not None:
                lost = torch.from_numpy(outcome.lost).to(device)
                cuts.add(t, lost & ~start, decision.value)
                _restart(envs, seeds, outcome.lost)
                for key, x in current.items():
                    storage.obs[key][t].copy_(torch.where(_rows(outcome.lost, x), x, storage.obs[key][t].cpu()))
                obs = _at(storage, t, device)
                start = start | lost
                kept = decision.clone()
                decision = actor(obs, carried, start, noise[t]).where(lost, kept)
                decision.store(storage, t, start)
                host_action = decision.action.cpu().numpy()
                outcome = envs.step_lost(host_action, seeds.current)
        reward[t], terminated[t], truncated[t] = outcome.reward, outcome.terminated, outcome.truncated
        end = outcome.terminated | outcome.truncated
        if end.any():
            seeds.advance(end)
            episodes += outcome.episodes
            if outcome.truncated.any():
                finals.add(t, envs, outcome.truncated, decision.after)
        with timer("transfer"):
            carried = decision.after
            start = torch.from_numpy(end).to(device)
            if t + 1 < storage.num_steps:
                for key, x in current.items():
                    storage.obs[key][t + 1].copy_(x)

    carry = Carry(obs={key: x.to(device, copy=True) for key, x in current.items()}, start=start, state=carried.clone())
    storage.reward.copy_(torch.from_numpy(reward))
    storage.terminated.copy_(torch.from_numpy(terminated))
    storage.truncated.copy_(torch.from_numpy(truncated))
    storage.next_value[:-1] = storage.value[1:]
    storage.next_value[-1] = agent.step(carry.obs, agent.reset_state(carried, start))[1]
    if finals.t:
        storage.next_value[finals.t, finals.n] = finals.value(agent)
    cuts.mark(storage)
    storage.next_value[storage.terminated] = 0.0
    return Collected(
        rollout=storage, carry=carry, episodes=episodes, cut_episodes=cuts.count, faults=envs.take_faults()
    )
