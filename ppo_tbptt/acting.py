"""One step of acting for N environments; on a GPU as one captured graph.

A step is about forty small kernels, whose launches one by one take a GPU's host longer than the kernels themselves.
Captured once with fixed shapes they are launched together. The graph holds addresses, not values: it reads the weights
as they are at each step, and converts them to bfloat16 by itself.
"""

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.models.heads import sample
from ppo_tbptt.types import Obs


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """What one step gives. On a GPU the tensors are overwritten by the next step: copy what is to stay."""

    state: Float[Tensor, "N D"]
    """What the core was fed: initial where an episode starts."""
    action: Int[Tensor, "N A"]
    log_prob: Float[Tensor, "N A"]
    value: Float[Tensor, "N"]
    after: Float[Tensor, "N D"]


def act(
    agent: Agent,
    obs: Obs,
    after: Float[Tensor, "N D"],
    start: Bool[Tensor, "N"],
    noise: Float[Tensor, "N A"],
) -> Acted:
    """One step from ``after``, the core's state after the step before; call it inside ``agent.acting()``."""
    state = agent.reset_state(after, start)
    logits, value, after = agent.step(obs, state)
    action, log_prob = sample(logits, noise, agent.action_nvec)
    return Acted(state=state, action=action, log_prob=log_prob, value=value, after=after)


class Actor:
    """Calls :func:`act`, on a GPU through a graph that it captures at its first call (of fixed shapes from then on)."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = agent.device.type == "cuda"

    def __call__(
        self,
        obs: Obs,
        after: Float[Tensor, "N D"],
        start: Bool[Tensor, "N"],
        noise: Float[Tensor, "N A"],
    ) -> Acted:
        if self._captures:
            self._captures = False
            try:
                self._capture(obs, after, start, noise)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"acting without a CUDA graph, slower: it could not be captured ({reason})", stacklevel=2)
        if self._graph is None:
            return act(self._agent, obs, after, start, noise)
        self._fill(obs, after, start, noise)
        self._graph.replay()
        return self._acted

    def _capture(self, obs: Obs, after: Tensor, start: Tensor, noise: Tensor) -> None:
        self._obs = {key: x.clone() for key, x in obs.items()}
        self._after, self._start, self._noise = after.clone(), start.clone(), noise.clone()
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries choose their algorithms and allocate before anything is captured
            for _ in range(3):
                act(self._agent, self._obs, self._after, self._start, self._noise)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._acted = act(self._agent, self._obs, self._after, self._start, self._noise)
        self._graph = graph

    def _fill(self, obs: Obs, after: Tensor, start: Tensor, noise: Tensor) -> None:
        for key, x in obs.items():
            self._obs[key].copy_(x, non_blocking=True)
        self._after.copy_(after)
        self._start.copy_(start)
        self._noise.copy_(noise)
