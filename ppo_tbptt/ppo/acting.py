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
from ppo_tbptt.types import Obs, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the agent makes of N observations."""

    state: Float[Tensor, "N D"]
    """What the core was fed: initial where an episode starts."""
    action: Int[Tensor, "N A"]
    log_prob: Float[Tensor, "N A"]
    value: Float[Tensor, "N"]
    after: Float[Tensor, "N D"]
    """The core's state after the step."""

    def store(self, storage: Rollout, t: int, rows: slice, start: Bool[Tensor, "N"]) -> None:
        """As step t of the environments ``rows``."""
        storage.start[t, rows] = start
        storage.state[t, rows] = self.state
        storage.action[t, rows] = self.action
        storage.log_prob[t, rows] = self.log_prob
        storage.value[t, rows] = self.value

    def where(self, rows: Bool[Tensor, "N"], other: "Decision") -> "Decision":
        """This one in ``rows``, the other elsewhere."""
        return Decision(
            state=torch.where(rows[:, None], self.state, other.state),
            action=torch.where(rows[:, None], self.action, other.action),
            log_prob=torch.where(rows[:, None], self.log_prob, other.log_prob),
            value=torch.where(rows, self.value, other.value),
            after=torch.where(rows[:, None], self.after, other.after),
        )

    def clone(self) -> "Decision":
        return Decision(
            state=self.state.clone(),
            action=self.action.clone(),
            log_prob=self.log_prob.clone(),
            value=self.value.clone(),
            after=self.after.clone(),
        )


def decide(
    agent: Agent,
    obs: Obs,
    carried: Float[Tensor, "N D"],
    start: Bool[Tensor, "N"],
    noise: Float[Tensor, "N A"],
) -> Decision:
    """One step from ``carried``, the core's state after the step before; call it inside ``agent.acting()``."""
    state = agent.reset_state(carried, start)
    output = agent.step(obs, state)
    action, log_prob = sample(output.logits, noise, agent.action_nvec)
    return Decision(state=state, action=action, log_prob=log_prob, value=output.value, after=output.state_out)


class Actor:
    """Calls :func:`decide`; on a GPU through a graph, captured at the first call, whose shapes then hold.

    What it returns there is overwritten by its next call: ``clone`` what is to stay.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = agent.device.type == "cuda"

    @property
    def captured(self) -> bool:
        """Whether it acts through a graph."""
        return self._graph is not None

    def __call__(
        self,
        obs: Obs,
        carried: Float[Tensor, "N D"],
        start: Bool[Tensor, "N"],
        noise: Float[Tensor, "N A"],
    ) -> Decision:
        if self._captures:
            self._captures = False
            try:
                self._capture(obs, carried, start, noise)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(f"acting without a CUDA graph, slower: it could not be captured ({reason})", stacklevel=2)
        if self._graph is None:
            return decide(self.agent, obs, carried, start, noise)
        for key, x in obs.items():
            self._obs[key].copy_(x)
        self._carried.copy_(carried)
        self._start.copy_(start)
        self._noise.copy_(noise)
        self._graph.replay()
        return self._decision

    def _capture(self, obs: Obs, carried: Tensor, start: Tensor, noise: Tensor) -> None:
        self._obs = {key: x.clone() for key, x in obs.items()}
        self._carried, self._start, self._noise = carried.clone(), start.clone(), noise.clone()
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries choose their algorithms and allocate before anything is captured
            for _ in range(3):
                decide(self.agent, self._obs, self._carried, self._start, self._noise)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._decision = decide(self.agent, self._obs, self._carried, self._start, self._noise)
        self._graph = graph
