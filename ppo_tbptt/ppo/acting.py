"""Acting: one step of the agent for N environments; while collecting on a GPU as one captured CUDA graph.

A step is about forty small kernels, which take the host longer to launch one by one than the GPU to run. Captured once
with fixed shapes they are launched together. The graph holds addresses, not values: it reads the current weights at
each replay, and converts them to bfloat16 itself.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import log_prob_and_entropy, mode, sample
from ppo_tbptt.types import Projected, Rollout

Observed = Mapping[str, Tensor | Projected]
"""N observations by key, of which known frames may be projected already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorOutput:
    """What the agent makes of N observations."""

    state_in: Float[Tensor, "N D"]
    """What the core was fed: the initial state where an episode starts."""
    action: Int[Tensor, "N A"]
    log_prob: Float[Tensor, "N A"]
    logits: Float[Tensor, "N K"]
    value: Float[Tensor, "N"]
    state_out: Float[Tensor, "N D"]
    """The core's state after the step."""

    def store(self, storage: Rollout, t: int, rows: slice, start: Bool[Tensor, "N"]) -> None:
        """Write it as step t of the environments ``rows``."""
        storage.start[t, rows] = start
        storage.state.store(t, rows, self.state_in, start)
        storage.action[t, rows] = self.action
        storage.log_prob[t, rows] = self.log_prob
        storage.value[t, rows] = self.value


def act(
    agent: Agent, obs: Observed, state_in: Float[Tensor, "N D"], uniforms: Float[Tensor, "N A"] | None
) -> ActorOutput:
    """Run one step of the agent and choose actions; call it without gradients.

    Args:
        agent: in evaluation mode, so that dropout does not act.
        obs: on the agent's device; see :meth:`~ppo_tbptt.models.Agent.step`.
        state_in: what the core is fed, already reset where an episode starts.
        uniforms: numbers in [0, 1) that decide the actions, one per branch; None takes the most probable choices.
    """
    output = agent.step(obs, state_in)
    if uniforms is None:
        action = mode(output.logits, agent.action_nvec)
        log_prob, _ = log_prob_and_entropy(output.logits, action, agent.action_nvec)
    else:
        action, log_prob = sample(output.logits, uniforms, agent.action_nvec)
    return ActorOutput(
        state_in=state_in,
        action=action,
        log_prob=log_prob,
        logits=output.logits,
        value=output.value,
        state_out=output.state_out,
    )


def reset_and_act(
    agent: Agent,
    obs: Observed,
    state: Float[Tensor, "N D"],
    start: Bool[Tensor, "N"],
    uniforms: Float[Tensor, "N A"] | None,
) -> ActorOutput:
    """Like :func:`act`, from the previous step's ``state_out``, which is reset where ``start``."""
    return act(agent, obs, agent.reset_state(state, start), uniforms)


def bootstrap_value(agent: Agent, obs: Observed, state_in: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """Compute the value of observations that are not acted on."""
    return agent.step(obs, state_in).value


class Actor:
    """Calls :func:`reset_and_act`; on a GPU through a graph that the first call captures, and whose shapes then hold.

    It is captured again where projected frames have moved. The graph's outputs are overwritten by the next call.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = agent.device.type == "cuda"
        self._addresses: dict[str, int] | None = None  # that the graph reads projections from

    @property
    def captured(self) -> bool:
        """Whether it acts through a graph."""
        return self._graph is not None

    def __call__(
        self, obs: Observed, state: Float[Tensor, "N D"], start: Bool[Tensor, "N"], uniforms: Float[Tensor, "N A"]
    ) -> ActorOutput:
        """Run :func:`reset_and_act` with the same arguments."""
        addresses = {key: x.values.data_ptr() if isinstance(x, Projected) else 0 for key, x in obs.items()}
        if self._captures and addresses != self._addresses:
            self._addresses = addresses
            try:
                self._capture(obs, state, start, uniforms)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"acting without a CUDA graph, slower: it could not be captured ({reason})", stacklevel=2)
                self._captures, self._graph = False, None
        if self._graph is None:
            return reset_and_act(self.agent, obs, state, start, uniforms)
        for buffer, x in zip(self._buffers, _tensors(obs, state, start, uniforms), strict=True):
            buffer.copy_(x)
        self._graph.replay()
        return self._output

    def _capture(self, obs: Observed, *inputs: Tensor) -> None:
        self._buffers = [x.clone() for x in _tensors(obs, *inputs)]
        *fixed, state, start, uniforms = self._buffers
        pairs = zip(obs.items(), fixed, strict=True)
        own = {key: Projected(x.values, buffer) if isinstance(x, Projected) else buffer for (key, x), buffer in pairs}
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries choose algorithms and allocate memory before the capture
            for _ in range(3):
                reset_and_act(self.agent, own, state, start, uniforms)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = reset_and_act(self.agent, own, state, start, uniforms)
        self._graph = graph


def _tensors(obs: Observed, *others: Tensor) -> list[Tensor]:
    """Return what changes from step to step."""
    return [*(x.number if isinstance(x, Projected) else x for x in obs.values()), *others]
