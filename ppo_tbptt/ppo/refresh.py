"""States computed anew: a rollout holds those of the weights that collected it, and each update makes them staler.

Two remedies: a refresh recomputes all of them before an epoch; burn-in recomputes those at which sequences start before
each update, from stored ones a few steps earlier (Kapturowski et al. 2019, Recurrent experience replay in distributed
reinforcement learning, section 3).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.ppo.frames import MOST_DISTINCT
from ppo_tbptt.runtime.pinned import to_device
from ppo_tbptt.types import Frames, Minibatch, Projected, Rollout, States

BLOCK = 1024
"""Observations that are projected at a time."""


def recomputed_states(agent: Agent, rollout: Rollout) -> States:
    """Compute what the core would have been fed at each step of the rollout with the agent's present weights.

    Those are kept that the rollout keeps.

    One pass without gradient or dropout, from the stored state at t = 0, and from the initial state where an episode
    starts. Each distinct frame is projected once where frames repeat; elsewhere :data:`BLOCK` of them at a time, so
    that never a whole rollout's features are in memory. The agent's mode and the rollout stay as they are.
    """
    states, all_envs = replace(rollout.state, rows=torch.empty_like(rollout.state.rows)), slice(0, rollout.num_envs)
    training = agent.training
    with agent.acting():
        state = agent.reset_state(rollout.state[0], rollout.start[0])
        states.write(0, all_envs, state)
        for t, obs in enumerate(_projected_steps(agent, rollout), 1):
            state = agent.reset_state(agent.step(obs, state).state_out, rollout.start[t])
            states.write(t, all_envs, state)
    states.drop_unkept()
    agent.train(training)
    return states


@torch.no_grad()
def burnt_in(agent: Agent, batch: Minibatch) -> Minibatch:
    """Replace the states of sequences with a burn-in by those after it; the same object where there is none.

    No gradient goes back into the burn-in. Dropout acts in it as in the sequences: it does in an agent that trains.
    """
    if (burn_in := batch.burn_in) is None:
        return batch
    output = agent.unroll(burn_in.obs, burn_in.state, burn_in.sequences_per_step, features=False)
    return replace(batch, state=batch.state.index_copy(0, burn_in.sequence, output.state_out))


def _projected_steps(agent: Agent, rollout: Rollout) -> Iterator[dict[str, Projected]]:
    """Yield the observations of all steps but the last."""
    num_envs, device = rollout.num_envs, agent.device
    steps_per_block = max(1, BLOCK // num_envs)
    rows = torch.arange(steps_per_block * num_envs, device=device).view(-1, num_envs)
    repeating = {key: x for key, x in rollout.obs.items() if isinstance(x, Frames) and _repeat(x)}
    tables = {key: torch.cat([_project(agent, key, x) for x in x.table.split(BLOCK)]) for key, x in repeating.items()}
    numbers = {key: to_device(x.number, device) for key, x in repeating.items()}
    block: dict[str, Tensor] = {}
    for t in range(rollout.num_steps - 1):
        if t % steps_per_block == 0:
            steps = slice(t, t + steps_per_block)
            block = {key: _project(agent, key, _rows(x, steps)) for key, x in rollout.obs.items() if key not in tables}
        yield {
            **{key: Projected(x, numbers[key][t]) for key, x in tables.items()},
            **{key: Projected(x, rows[t % steps_per_block]) for key, x in block.items()},
        }


def _repeat(frames: Frames) -> bool:
    return len(frames.table) <= MOST_DISTINCT * frames.number.numel()


def _rows(x: Tensor | Frames, steps: slice) -> Tensor:
    """Return the observations of these steps ``[steps * N, *shape]``."""
    if isinstance(x, Frames):
        return x.table.index_select(0, to_device(x.number[steps].flatten(), x.table.device))
    return x[steps].flatten(0, 1)


def _project(agent: Agent, key: str, x: Tensor) -> Float[Tensor, "_ P"]:
    return agent.project({key: to_device(x, agent.device)})[key]
