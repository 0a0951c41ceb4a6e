"""Small rollouts with and without environments, and a naive unroll to compare with."""

from dataclasses import fields

import torch
from torch import Tensor

from ppo_tbptt.envs import LevelSeeds, VectorEnv
from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy, sample
from ppo_tbptt.ppo.collector import empty_rollout
from ppo_tbptt.types import Rollout, Targets

VECTOR = {"obs": (5,)}
NVEC = (3, 2)


def small_agent(core: str = "gru", num_layers: int = 1, dropout: float = 0.0, seed: int = 0) -> Agent:
    """A vector agent of a few hundred weights, large enough to make a wrong state visible."""
    torch.manual_seed(seed)
    agent = Agent(
        VECTOR,
        NVEC,
        core=core,
        core_hidden_size=8,
        num_layers=num_layers,
        dropout=dropout,
        hidden_size=16,
        vector_hidden_sizes=(8,),
    )
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 2.0)  # far from uniform: the state matters
    return agent


@torch.no_grad()
def fake_rollout(agent: Agent, start: Tensor, *, seed: int = 0, store: str = "before") -> Rollout:
    """A rollout of ``agent`` over random observations with the given ``start`` pattern [T, N].

    The state before it is random, not zero. ``store = "after"`` is the mutant that stores each step's state too late.
    """
    generator = torch.Generator().manual_seed(seed)
    steps, envs = start.shape
    obs = torch.randn(steps, envs, 5, generator=generator)
    rollout = empty_rollout(
        {"obs": ((5,), torch.float32)},
        num_steps=steps,
        num_envs=envs,
        num_branches=len(NVEC),
        state_size=agent.core.state_size,
        device=torch.device("cpu"),
    )
    agent.eval()
    rollout.obs["obs"].copy_(obs)
    rollout.start.copy_(start)
    after = torch.randn(envs, agent.core.state_size, generator=generator)
    for t in range(steps):
        state = agent.reset_state(after, start[t])
        logits, value, after = agent.step({"obs": obs[t]}, state)
        action, log_prob = sample(logits, torch.rand(envs, len(NVEC), generator=generator), NVEC)
        rollout.state[t] = state if store == "before" else after
        rollout.action[t], rollout.log_prob[t], rollout.value[t] = action, log_prob, value
    return rollout


def fake_targets(rollout: Rollout, seed: int = 1) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    advantage, error = (torch.randn(rollout.value.shape, generator=generator) for _ in range(2))
    return Targets(advantage=advantage.to(rollout.value.device), ret=rollout.value + error.to(rollout.value.device))


def naive_unroll(agent: Agent, rollout: Rollout, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step by step through the rollout, one environment after the other.

    The state is reset at starts; gradients stop where ``begins`` [T, N] is True. Returns log-probs [T, N, A],
    entropies [T, N] and values [T, N].
    """
    steps, envs = rollout.start.shape
    log_probs, entropies, values = [], [], []
    for n in range(envs):
        state = rollout.state[0, n : n + 1]
        for t in range(steps):
            if begins[t, n]:
                state = state.detach()
            if rollout.start[t, n]:
                state = agent.core.initial_state(1)
            logits, value, state = agent.step({"obs": rollout.obs["obs"][t, n : n + 1]}, state)
            log_prob, entropy = log_prob_and_entropy(logits, rollout.action[t, n : n + 1], NVEC)
            log_probs.append(log_prob[0])
            entropies.append(entropy[0])
            values.append(value[0])

    def time_first(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows).unflatten(0, (envs, steps)).transpose(0, 1)

    return time_first(log_probs), time_first(entropies), time_first(values)


def max_difference(a: object, b: object) -> float:
    """Largest absolute difference over all tensors of two equal dataclasses."""
    largest = 0.0
    for field in fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, Tensor):
            largest = max(largest, float((x.double() - y.double()).abs().max()))
    return largest


def tracers(num_envs: int, num_workers: int = 0, *, two_groups: bool = False) -> VectorEnv:
    """Tracers on the levels 10 to 59."""
    levels = LevelSeeds(7, num_envs, 10, 50)
    env_id = "fixture_envs:fixture/Tracer-v0"
    return VectorEnv(env_id, num_envs=num_envs, levels=levels, num_workers=num_workers, two_groups=two_groups)
