"""Time every recurrent core against GRU, in turn: acting, and updates over sequences of several lengths."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ppo_tbptt.benchmark.measure import synchronize
from ppo_tbptt.config import Config
from ppo_tbptt.envs import make_env
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.models.cores import CORES
from ppo_tbptt.models.heads import at_least_float32
from ppo_tbptt.runtime.device import prepare_device

BASE = "gru"
LENGTHS = (32, 128, 512)
"""Steps of the sequences that updates are of."""
TURN_SECONDS = 0.1
"""About how long a core's turn takes; one call at the least."""


@dataclass(slots=True)
class _Timed:
    """A call, and how often it is made in a turn."""

    call: Callable[[], object]
    calls: int = 1

    def turn(self, device: torch.device) -> float:
        """Make so many calls; return the seconds of one."""
        synchronize(device)
        began = perf_counter()
        for _ in range(self.calls):
            self.call()
        synchronize(device)
        return (perf_counter() - began) / self.calls


def measure_cores(config: Config, warmup: int, turns: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all cores with the config's options but for their kind: the core alone, encoder and heads left out.

    Acting is a step of all environments. An update is forward and backward through as many steps as a minibatch has,
    in sequences of equal length, each from its own state. Both begin with projected inputs. The projection itself,
    forward and backward for as many steps, is measured apart: where frames repeat, it is computed for few of them
    (:meth:`.Core.project_input`). Every turn of a core is compared with GRU's right before it.

    Returns:
        What was measured of each core, by kind: seconds of a call (the median turn), how many times as fast as GRU
        that is, and the range of that ratio over the turns.

    Raises:
        ConfigError: a core that refuses the options.
    """
    device = prepare_device(config.device)
    env = make_env(config.env.id, options=config.env.options, previous=config.model.previous)
    env.close()
    agents = {
        kind: build_agent(config.override({"core.kind": kind}), env.spec, device) for kind in CORES if kind != "none"
    }
    steps = config.batch_size // config.ppo.num_minibatches
    result: dict[str, Any] = {
        kind: {
            "parameters": sum(parameter.numel() for parameter in agent.core.parameters()),
            "state_size": agent.core.state_size,
        }
        for kind, agent in agents.items()
    }
    say("projection")
    measured = {"projection": _in_turn(agents, lambda agent: _projection(agent, steps), warmup, turns)}
    say("acting")
    with agents[BASE].acting():  # weights are converted to bfloat16 once; all agents are of the same precision
        measured["acting"] = _in_turn(agents, lambda agent: _acting(agent, config.env.num_envs), warmup, turns)
    for length in LENGTHS:
        say(f"updates over sequences of {length}")
        update = partial(_update, length=length, sequences=max(1, steps // length))
        measured[f"update_{length}"] = _in_turn(agents, update, warmup, turns)
    for (name, by_kind), kind in product(measured.items(), agents):
        result[kind][name] = by_kind[kind]
    agent = agents[BASE]
    return {
        "cores": result,
        "environments": config.env.num_envs,
        "input_size": agent.encoder.output_size,
        "output_size": agent.core.output_size,
        "steps": steps,
        "lengths": list(LENGTHS),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": str(agent.precision).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _in_turn(
    agents: dict[str, Agent], make: Callable[[Agent], Callable[[], object]], warmup: int, turns: int
) -> dict[str, dict[str, Any]]:
    """Time what ``make`` makes of each agent in turn, GRU before each of the others; return each one's figures."""
    device = agents[BASE].device
    timed = {kind: _Timed(make(agent)) for kind, agent in agents.items()}
    for one in timed.values():
        seconds = [one.turn(device) for _ in range(warmup)]
        one.calls = max(1, round(TURN_SECONDS / seconds[-1]))
    figures = {}
    for kind, one in timed.items():
        pairs = [(timed[BASE].turn(device), one.turn(device)) for _ in range(turns)]
        ratios = [base / own for base, own in pairs]
        figures[kind] = {
            "seconds": median(own for _, own in pairs),
            "ratio": median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
        }
    return figures


def _projection(agent: Agent, steps: int) -> Callable[[], object]:
    """Return a forward and a backward pass through the projection of so many inputs, as in an update."""
    core, x = agent.core.train(), torch.randn(steps, agent.encoder.output_size, device=agent.device)
    x.requires_grad_()

    def project() -> None:
        with agent.arithmetic():
            projected = _projected(agent, x)
        core.zero_grad(set_to_none=True)
        x.grad = None
        projected.backward(torch.ones_like(projected))

    return project


def _acting(agent: Agent, num_envs: int) -> Callable[[], object]:
    """Return a step of all environments; to be called while acting."""
    core, x = agent.core.eval(), torch.randn(num_envs, agent.encoder.output_size, device=agent.device)
    projected, state = _projected(agent, x)[None], core.initial_state(num_envs)
    return lambda: core(projected, state)


def _update(agent: Agent, length: int, sequences: int) -> Callable[[], object]:
    """Return a forward and a backward pass over so many sequences, as an update makes it."""
    core, steps = agent.core.train(), length * sequences
    with torch.no_grad(), agent.arithmetic():
        projected = _projected(agent, torch.randn(steps, agent.encoder.output_size, device=agent.device))
    projected.requires_grad_()
    gradient = torch.randn(steps, core.output_size, device=agent.device)
    state = core.initial_state(sequences).detach()
    sequences_per_step = torch.full((length,), sequences)

    def update() -> None:
        with agent.arithmetic():
            y, _ = core.unroll(projected, state, sequences_per_step)
        core.zero_grad(set_to_none=True)
        projected.grad = None
        y.backward(gradient.to(y.dtype))

    return update


def _projected(agent: Agent, x: Tensor) -> Tensor:
    """Return what the core takes of features, as the agent computes it."""
    projected = agent.core.project_input(x, slice(0, x.shape[1]))
    return agent.core.join_inputs([at_least_float32(projected)])
