"""Collecting: T steps of N environments into a :class:`~ppo_tbptt.types.Rollout`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ppo_tbptt.envs import BatchedEnv, Episode, StepResult
from ppo_tbptt.envs.interface import Array
from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.acting import Actor, ActorOutput, bootstrap_value
from ppo_tbptt.ppo.frames import Observations
from ppo_tbptt.runtime.pinned import PageLock, to_device
from ppo_tbptt.runtime.timing import Timer
from ppo_tbptt.types import Carry, Frames, Rollout, States


@dataclass(slots=True, kw_only=True)
class CollectedRollout:
    """What one call of :meth:`RolloutCollector.collect` returns."""

    rollout: Rollout
    carry: Carry
    episodes: list[Episode]
    """Those that ended during the rollout, in order of time, then environment; without the cut ones."""
    cut_episodes: int
    """Episodes that ended, as truncated, because their environment failed."""
    faults: list[str]
    """A text for each fault of environments and workers since the last rollout."""
    distinct_fraction: float | None
    """Share of distinct frames; None without images, or where the environments hash nothing."""
    notes: list[str]
    """A line for the user where this share has decided how frames are stored."""


class RolloutCollector:
    """Lets an agent act in a batch of environments.

    Where the batch has two groups, one steps while the agent acts for the other. On a GPU each group is acted for
    through a captured graph (:mod:`ppo_tbptt.ppo.acting`), and the host memory in which observations come is
    page-locked, so that copies from there to the GPU don't make the host wait.
    """

    def __init__(
        self,
        envs: BatchedEnv,
        agent: Agent,
        *,
        obs_device: torch.device | None = None,
        distinct_frames: bool | None = None,
    ) -> None:
        """Page-lock the batch's host memory, where the agent is on a GPU.

        ``obs_device`` and ``distinct_frames`` are as of :class:`~ppo_tbptt.ppo.frames.Observations`.
        """
        self.envs = envs
        self.agent = agent
        self.observations = Observations(envs, agent, obs_device or agent.device, distinct_frames)
        self._actors = [Actor(agent) for _ in envs.groups]
        memory = envs.host_memory
        self._lock = PageLock(memory) if agent.device.type == "cuda" and memory is not None else None

    def begin(self) -> Carry:
        """Reset all environments; every one is at the start of an episode."""
        self.envs.reset()
        start = torch.ones(self.envs.num_envs, dtype=torch.bool)
        return self._carry(start, self.agent.core.initial_state(self.envs.num_envs).detach().clone())

    def resume(
        self,
        saved: Mapping[str, Array],
        start: Bool[Tensor, "N"],
        state: Float[Tensor, "N D"],
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Carry, np.ndarray]:
        """Go on in the middle of saved episodes.

        Args:
            saved: what the environments' ``state_dict`` returned.
            start: of the carry at that time, as ``state``.
            state: the core's state after the last step.
            progress: called with the number of environments that are done, and N.

        Returns the carry, and bool ``[N]``: False where an episode could not be repeated, and a new one begins.
        """
        exact = self.envs.load_state_dict(saved, progress)
        return self._carry(start.cpu() | torch.from_numpy(~exact), state), exact

    def collect(
        self, carry: Carry, storage: Rollout, uniforms: Float[Tensor, "T N A"], timer: Timer
    ) -> CollectedRollout:
        """Fill ``storage`` with T steps that go on from ``carry``.

        ``uniforms`` (in [0, 1), on the CPU) decide the actions, so that nothing depends on how the environments are
        spread over workers. Dropout does not act. ``next_value`` is the value of each step's true successor: 0 where
        terminated, V(final observation, state after the step) where truncated, and the next step's value otherwise,
        the last one from the carried observation and state.

        Where an environment fails, its episode is truncated with that step: reward 0, and the observation that the
        step was chosen for as the final one.

        Raises:
            WorkerError: an environment failed, and no more faults are survived.
        """
        uniforms = uniforms.to(self.agent.device)
        finals = _FinalObservations()
        self.observations.begin(storage)
        with self.agent.acting():
            groups = [
                _Group(self, index, actor, carry, storage, uniforms, finals, timer)
                for index, actor in enumerate(self._actors)
            ]
            for group in groups:
                group.act(0)
            for t in range(storage.num_steps):
                for group in groups:
                    group.finish(t)
                    if t + 1 < storage.num_steps:
                        group.act(t + 1)
            start = torch.cat([group.start for group in groups])
            carry = self._carry(start, torch.cat([group.state for group in groups]))
            for group in groups:
                group.store_outcomes()
            storage.state.drop_unkept()
            state_in = self.agent.reset_state(carry.state, carry.start)
            storage.next_value[:-1] = storage.value[1:]
            last = self.observations.inputs(storage.num_steps, slice(0, storage.num_envs))
            storage.next_value[-1] = bootstrap_value(self.agent, last, state_in)
            finals.bootstrap(storage, self.agent)
            storage.next_value.masked_fill_(storage.terminated, 0.0)
        distinct_fraction, notes = self.observations.finish()
        by_time = [(t, group.results[t]) for t in range(storage.num_steps) for group in groups]
        return CollectedRollout(
            rollout=storage,
            carry=carry,
            episodes=[replace(episode, step=t) for t, result in by_time for episode in result.episodes],
            cut_episodes=sum(int(result.failed.sum()) for _, result in by_time if result.failed is not None),
            faults=[text for _, result in by_time for text in result.faults],
            distinct_fraction=distinct_fraction,
            notes=notes,
        )

    def close(self) -> None:
        """Unlock the environments' memory, before they are closed. May be called again."""
        if self._lock is not None:
            self._lock.release()

    def _carry(self, start: Bool[Tensor, "N"], state: Float[Tensor, "N D"]) -> Carry:
        return Carry(start=start.to(self.agent.device), state=state.to(self.agent.device))


class _Group:
    """One group of environments during one rollout."""

    def __init__(
        self,
        collector: RolloutCollector,
        index: int,
        actor: Actor,
        carry: Carry,
        storage: Rollout,
        uniforms: Tensor,
        finals: "_FinalObservations",
        timer: Timer,
    ) -> None:
        envs = self._envs = collector.envs
        self._observations, self._index, self._actor, self._storage = collector.observations, index, actor, storage
        self._finals, self._timer = finals, timer
        self._rows = envs.groups[index]
        self._env_device = torch.as_tensor(next(iter(envs.obs.values()))).device
        self._uniforms = uniforms[:, self._rows]
        self.results: list[StepResult] = []
        self.start = carry.start[self._rows]
        """Where the next step is the first of an episode."""
        self.state = carry.state[self._rows]
        """The core's state after the last step."""
        self._observations.store(0, self._rows)

    def act(self, t: int) -> None:
        """Choose the actions of step t, and send them to the environments."""
        with self._timer("inference"):
            obs = self._observations.inputs(t, self._rows)
            self._output = self._actor(obs, self.state, self.start, self._uniforms[t])
            self._output.store(self._storage, t, self._rows, self.start)
            action = self._output.action.to(self._env_device)
        with self._timer("environments"):
            self._envs.send(action, self._index)

    def finish(self, t: int) -> None:
        """Receive step t's outcome, and store the observations of the next step."""
        with self._timer("environments"):
            result = self._envs.receive(self._index)
        self.results.append(result)
        if result.truncated.any():
            self._finals.add(t, self._rows.start, result, self._observations, self._output)
        with self._timer("transfer"):
            self.state = self._output.state_out
            self.start = to_device(torch.as_tensor(result.terminated | result.truncated), self._uniforms.device)
            self._observations.store(t + 1, self._rows)

    def store_outcomes(self) -> None:
        """Store rewards and flags of all steps."""
        for name in ("reward", "terminated", "truncated"):
            steps = [torch.as_tensor(getattr(result, name)) for result in self.results]
            getattr(self._storage, name)[:, self._rows] = torch.stack(steps).to(self._storage.value.device)


@dataclass(slots=True)
class _FinalObservations:
    """Final observations of truncated episodes, kept until their values are computed in one batch."""

    t: list[int] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    obs: list[dict[str, Tensor]] = field(default_factory=list)
    state_in: list[Float[Tensor, "D"]] = field(default_factory=list)

    def add(self, t: int, first: int, result: StepResult, observations: Observations, output: ActorOutput) -> None:
        """Keep those of step t; ``first`` is the group's first environment."""
        for n in torch.as_tensor(result.truncated).nonzero().flatten().tolist():
            final = {key: torch.as_tensor(x)[n] for key, x in result.final_obs.items()}
            if result.failed is not None and result.failed[n]:
                final = {key: x.to(final[key].device) for key, x in observations.of(t, first + n).items()}
            self.t.append(t)
            self.n.append(first + n)
            self.obs.append({key: x.clone() for key, x in final.items()})
            self.state_in.append(output.state_out[n].clone())

    def bootstrap(self, storage: Rollout, agent: Agent) -> None:
        """Store their values as those of the truncated steps' successors."""
        if not self.t:
            return
        obs = {key: torch.stack([obs[key] for obs in self.obs]).to(agent.device) for key in self.obs[0]}
        value = bootstrap_value(agent, obs, torch.stack(self.state_in))
        position = to_device(torch.tensor(self.t) * storage.num_envs + torch.tensor(self.n), agent.device)
        storage.next_value.view(-1).index_copy_(0, position, value)


def obs_dtype(shape: tuple[int, ...]) -> torch.dtype:
    """Return the dtype of observations of ``shape``: frames are u8, vectors f32."""
    return torch.uint8 if len(shape) == 3 else torch.float32


def empty_rollout(
    agent: Agent, num_steps: int, num_envs: int, obs_device: torch.device | None = None, state_spacing: int = 1
) -> Rollout:
    """Allocate storage on the agent's device for a rollout of T steps and N environments.

    What is never written is NaN (or -1), so that it can't pass for data. ``obs_device`` is where vectors lie, if
    elsewhere: on the host, page-locked. Frames are put there in the course of the rollout. A core with a wide state has
    its states stored only every ``state_spacing`` steps (:attr:`.PPOConfig.state_spacing`).
    """
    lead, device, num_branches = (num_steps, num_envs), agent.device, len(agent.action_nvec)
    obs_device = obs_device or device

    def floats(*shape: int) -> Tensor:
        return torch.full((*lead, *shape), torch.nan, device=device)

    def flags() -> Tensor:
        return torch.zeros(lead, dtype=torch.bool, device=device)

    def observations(shape: tuple[int, ...]) -> Tensor | Frames:
        if obs_dtype(shape) == torch.uint8:
            return Frames(torch.empty(0, *shape, dtype=torch.uint8), torch.full(lead, -1))
        return torch.full((*lead, *shape), torch.nan, device=obs_device, pin_memory=obs_device != device)

    return Rollout(
        obs={key: observations(shape) for key, shape in agent.obs_shapes.items()},
        start=flags(),
        state=States.empty(*lead, agent.core.state_size, state_spacing if agent.core.wide_state else 1, device),
        action=torch.full((*lead, num_branches), -1, device=device),
        log_prob=floats(num_branches),
        value=floats(),
        reward=floats(),
        next_value=floats(),
        terminated=flags(),
        truncated=flags(),
    )
