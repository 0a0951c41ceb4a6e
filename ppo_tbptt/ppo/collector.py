"""Acting: T steps of N environments into a :class:`~ppo_tbptt.types.Rollout`."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec, Episode, VectorEnv
from ppo_tbptt.envs.workers.fleet import Fleet, Part
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.acting import Actor, Decision
from ppo_tbptt.runtime.device import storage_device
from ppo_tbptt.runtime.pinned import PageLock, to_device
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Carry, Obs, Rollout


@dataclass(slots=True, kw_only=True)
class Collected:
    """What came of one call of :meth:`Sampler.collect`."""

    rollout: Rollout
    carry: Carry
    episodes: list[Episode]
    """Those that ended during the rollout, in order of time, then environment."""
    cut_episodes: int
    """Those that a failure ended after at least one step; they are not among ``episodes``."""
    faults: list[str]
    """A text for each restart of environments since the last rollout."""


class Sampler:
    """Lets an agent act in the environments of a fleet.

    Where the fleet has two parts, the workers of one step while the agent acts for the other. On a GPU each part acts
    through a captured graph (:mod:`ppo_tbptt.ppo.acting`), and the memory that is shared with the workers is page-locked,
    so that observations go from there to the GPU at once.
    """

    def __init__(self, fleet: Fleet, agent: Agent) -> None:
        self.fleet = fleet
        self.agent = agent
        self._actors = [Actor(agent) for _ in fleet.parts]
        cuda = agent.device.type == "cuda"
        self._locks = [PageLock(part.envs.memory) for part in fleet.parts if cuda]

    def begin(self) -> Carry:
        """Reset all environments; every one is at the start of an episode."""
        for part in self.fleet.parts:
            part.begin()
        num_envs = self.fleet.num_envs
        start = torch.ones(num_envs, dtype=torch.bool, device=self.agent.device)
        return Carry(obs=self.obs(), start=start, state=self.agent.core.initial_state(num_envs))

    def obs(self) -> Obs:
        """A copy of all current observations, on the agent's device."""
        rows = [part.envs.obs for part in self.fleet.parts]
        device = self.agent.device
        return {key: torch.cat([torch.from_numpy(obs[key]).to(device) for obs in rows]) for key in rows[0]}

    def collect(self, carry: Carry, storage: Rollout, noise: Float[Tensor, "T N A"], timer: Timer) -> Collected:
        """Fill ``storage`` with T steps that go on from ``carry``.

        ``noise`` (uniform on [0, 1), on the CPU) decides the actions, so that nothing depends on how the environments
        are spread over workers. Dropout does not act here. At the end ``next_value`` is the value of each step's true
        successor: 0 where terminated, V(final observation, state after the step) where truncated, and the next step's
        value otherwise, the last one from the carried observation and state.

        Where environments fail in step t and restart, their episodes end, as truncated, with step t - 1; the values of
        step t's observations, which the agent had seen by then, are its successors'. Step t is then the first one of
        new episodes, decided with the same noise. All other environments take step t once.

        Raises:
            WorkerError: an environment or a worker failed, and no restarts are left.
        """
        with self.agent.acting():
            return self._collect(carry, storage, noise.to(self.agent.device), timer)

    def close(self) -> None:
        """Let go of the shared memory, and end the workers."""
        try:
            for lock in self._locks:
                lock.release()
        finally:
            self.fleet.close()

    def _collect(self, carry: Carry, storage: Rollout, noise: Tensor, timer: Timer) -> Collected:
        agent, record = self.agent, _Record(storage)
        players = [
            _Player(part, actor, carry, record, noise, timer)
            for part, actor in zip(self.fleet.parts, self._actors, strict=True)
        ]
        episodes: list[Episode] = []
        for player in players:
            player.act(0)
        for t in range(storage.num_steps):
            for player in players:
                episodes += player.finish(t)
                if t + 1 < storage.num_steps:
                    player.act(t + 1)
        carry = Carry(
            obs=self.obs(),
            start=torch.cat([player.start for player in players]),
            state=torch.cat([player.carried for player in players]),
        )
        record.complete(agent, agent.step(carry.obs, agent.reset_state(carry.state, carry.start)).value)
        return Collected(
            rollout=storage,
            carry=carry,
            episodes=episodes,
            cut_episodes=record.cuts.count,
            faults=self.fleet.take_faults(),
        )


class _Player:
    """A part of the fleet during one rollout."""

    def __init__(self, part: Part, actor: Actor, carry: Carry, record: "_Record", noise: Tensor, timer: Timer) -> None:
        self._part, self._actor, self._record, self._timer = part, actor, record, timer
        self._rows = part.rows
        self._noise = noise[:, self._rows]
        self._storage = record.storage
        self._current = {key: torch.from_numpy(x) for key, x in part.envs.obs.items()}  # views of shared memory
        self.start = carry.start[self._rows]
        """Where the next step is the first of an episode."""
        self.carried = carry.state[self._rows]
        """The core's state after the last step."""
        for key, x in carry.obs.items():
            self._obs_at(0)[key].copy_(x[self._rows])

    def act(self, t: int) -> None:
        """Decide step t, and let the environments take it."""
        with self._timer("inference"):
            self._decision = self._decide(t)
            action = self._store(t)
        with self._timer("environments"):
            self._part.envs.send(action, self._part.seeds.current)

    def finish(self, t: int) -> list[Episode]:
        """Wait for the environments and store step t's outcome. Returns the episodes that ended."""
        part = self._part
        with self._timer("environments"):
            outcome = part.envs.receive()
            while outcome.lost is not None:
                outcome = part.envs.step_lost(self._begin_again(t, outcome.lost), part.seeds.current)
        self._record.reward[t, self._rows] = outcome.reward
        self._record.terminated[t, self._rows] = outcome.terminated
        self._record.truncated[t, self._rows] = outcome.truncated
        end = outcome.terminated | outcome.truncated
        if end.any():
            part.seeds.advance(end)
            if outcome.truncated.any():
                self._record.finals.add(t, self._rows.start, part.envs, outcome.truncated, self._decision.after)
        with self._timer("transfer"):
            self.carried = self._decision.after
            self.start = to_device(torch.from_numpy(end), self._noise.device)
            if t + 1 < self._storage.num_steps:
                # Not waited for: the workers write there again only after the next actions, which wait for it.
                for key, x in self._obs_at(t + 1).items():
                    x.copy_(self._current[key], non_blocking=True)
        return outcome.episodes

    def _obs_at(self, t: int) -> Obs:
        return {key: x[t, self._rows] for key, x in self._storage.obs.items()}

    def _decide(self, t: int) -> Decision:
        obs = {key: x.to(self._noise.device, non_blocking=True) for key, x in self._obs_at(t).items()}
        return self._actor(obs, self.carried, self.start, self._noise[t])

    def _store(self, t: int) -> np.ndarray:
        """Store step t's decision; its actions, for the environments."""
        self._decision.store(self._storage, t, self._rows, self.start)
        return self._decision.action.cpu().numpy()

    def _begin_again(self, t: int, lost: np.ndarray) -> np.ndarray:
        """New episodes where they are lost, with step t as their first: the actions."""
        rows = torch.from_numpy(lost).to(self._noise.device)
        self._record.cuts.add(t, self._rows, rows & ~self.start, self._decision.value)
        self._part.restart(lost)
        for key, x in self._obs_at(t).items():
            now = self._current[key]
            x.copy_(torch.where(torch.from_numpy(lost).view(-1, *[1] * (now.dim() - 1)), now, x.cpu()))
        self.start = self.start | rows
        kept = self._decision.clone()
        self._decision = self._decide(t).where(rows, kept)
        return self._store(t)


class _Record:
    """The outcomes of all steps of one rollout, on the host until it is complete."""

    def __init__(self, storage: Rollout) -> None:
        self.storage = storage
        self.reward = np.full((storage.num_steps, storage.num_envs), np.nan, dtype=np.float32)
        self.terminated = np.zeros(self.reward.shape, dtype=np.bool_)
        self.truncated = np.zeros(self.reward.shape, dtype=np.bool_)
        self.finals = _FinalObservations()
        self.cuts = _Cuts()

    def complete(self, agent: Agent, last_value: Float[Tensor, "N"]) -> None:
        """Fill in what depends on more than one step; ``last_value`` is that of the observations after the last."""
        storage = self.storage
        storage.reward.copy_(torch.from_numpy(self.reward))
        storage.terminated.copy_(torch.from_numpy(self.terminated))
        storage.truncated.copy_(torch.from_numpy(self.truncated))
        storage.next_value[:-1] = storage.value[1:]
        storage.next_value[-1] = last_value
        self.finals.mark(storage, agent)
        self.cuts.mark(storage)
        storage.next_value.masked_fill_(storage.terminated, 0.0)


@dataclass(slots=True)
class _Cuts:
    """Episodes that a failure cut: where, and the value of what would have come next."""

    count: int = 0
    where: list[tuple[int, slice]] = field(default_factory=list)
    rows: list[Bool[Tensor, "n"]] = field(default_factory=list)
    next_value: list[Float[Tensor, "n"]] = field(default_factory=list)

    def add(self, t: int, part: slice, rows: Bool[Tensor, "n"], value: Float[Tensor, "n"]) -> None:
        """Step t was lost in ``rows`` of ``part``, where an episode was under way; ``value`` is of t's observations."""
        self.count += int(rows.sum())
        if t > 0:  # else the last completed step is the previous rollout's, which counted on this very value
            self.where.append((t - 1, part))
            self.rows.append(rows)
            self.next_value.append(value.clone())

    def mark(self, storage: Rollout) -> None:
        """Truncate the cut episodes at their last completed steps."""
        for where, rows, value in zip(self.where, self.rows, self.next_value, strict=True):
            storage.truncated[where] |= rows
            storage.next_value[where] = torch.where(rows, value, storage.next_value[where])


@dataclass(slots=True)
class _FinalObservations:
    """The observations after truncations, kept until their values are computed in one batch."""

    t: list[int] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    obs: list[dict[str, np.ndarray]] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)

    def add(self, t: int, first: int, envs: VectorEnv, truncated: np.ndarray, after: Tensor) -> None:
        """``first`` is the number of the first of ``envs`` among all environments."""
        for n in np.flatnonzero(truncated).tolist():
            self.t.append(t)
            self.n.append(first + n)
            self.obs.append({key: x[n].copy() for key, x in envs.final_obs.items()})
            self.state.append(after[n].clone())

    def mark(self, storage: Rollout, agent: Agent) -> None:
        """Their values are those of the successors of the truncated steps."""
        if not self.t:
            return
        obs = {key: torch.from_numpy(np.stack([o[key] for o in self.obs])).to(agent.device) for key in self.obs[0]}
        value = agent.step(obs, torch.stack(self.state)).value
        position = to_device(torch.tensor(self.t) * storage.num_envs + torch.tensor(self.n), agent.device)
        storage.next_value.view(-1).index_copy_(0, position, value)


def rollout_storage(config: Config, spec: EnvSpec, state_size: int, device: torch.device) -> Rollout:
    """Storage for the config's rollouts: on ``device``, observations where the config says."""
    shapes = {key: (array.shape, getattr(torch, array.dtype)) for key, array in spec.obs.items()}
    row = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values())
    return empty_rollout(
        shapes,
        num_steps=config.ppo.rollout_steps,
        num_envs=config.env.num_envs,
        num_branches=len(spec.action_nvec),
        state_size=state_size,
        device=device,
        obs_device=storage_device(config.storage, config.batch_size * row, device),
    )


def empty_rollout(
    obs_shapes: dict[str, tuple[tuple[int, ...], torch.dtype]],
    *,
    num_steps: int,
    num_envs: int,
    num_branches: int,
    state_size: int,
    device: torch.device,
    obs_device: torch.device | None = None,
) -> Rollout:
    """Storage for one rollout. What is never written is NaN (or -1, or 0xAB), so that it cannot pass for data.

    ``obs_device``: where observations lie, if elsewhere: on the host, page-locked.
    """
    lead = (num_steps, num_envs)
    obs_device = obs_device or device
    pin = obs_device != device

    def floats(*shape: int) -> Tensor:
        return torch.full((*lead, *shape), torch.nan, device=device)

    return Rollout(
        obs={
            key: torch.full(
                (*lead, *shape),
                0xAB if dtype == torch.uint8 else torch.nan,
                dtype=dtype,
                device=obs_device,
                pin_memory=pin,
            )
            for key, (shape, dtype) in obs_shapes.items()
        },
        start=torch.zeros(lead, dtype=torch.bool, device=device),
        state=floats(state_size),
        action=torch.full((*lead, num_branches), -1, dtype=torch.int64, device=device),
        log_prob=floats(num_branches),
        value=floats(),
        reward=floats(),
        next_value=floats(),
        terminated=torch.zeros(lead, dtype=torch.bool, device=device),
        truncated=torch.zeros(lead, dtype=torch.bool, device=device),
    )
