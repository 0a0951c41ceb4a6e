"""What a recurrent core is, and what may lie around one: a shortcut, a normalisation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Core(nn.Module, ABC):
    """Turns features into features with memory.

    Constructed as ``(input_size, config)``. A subclass sets ``state_size`` (D), the width of the state, 0 without
    memory, and ``output_size`` (H). A user's core has a class ``Config`` too, whose keyword arguments are the options
    beside ``kind`` in the config's ``[core]``, and whose instance is ``config``.
    """

    Config: ClassVar[Any]
    state_size: int
    output_size: int
    padded = False
    """Whether :meth:`unroll` goes on with sequences that have ended, and leaves out what it made of them."""
    wide_state = False
    """Whether rollouts store states only where a sequence can begin, as those of all steps would take too much memory.
    Figures about stored states (``memory/state_norm``, ``memory/state_drift``) are then about these."""
    learnt_state: nn.Parameter | None
    """The state at the start of an episode, ``[D]``, if it is learnt."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.register_buffer("_like", torch.empty(0), persistent=False)  # knows dtype and device
        self.register_parameter("learnt_state", None)

    def initial_state(self, batch: int) -> Float[Tensor, "B D"]:
        """Return the state at the start of an episode: the learnt one if there is one, else zeros."""
        if self.learnt_state is not None:
            return self.learnt_state.expand(batch, -1)
        return self.get_buffer("_like").new_zeros(batch, self.state_size)

    def undecayed(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay does not apply to: by default the learnt state, if there is one."""
        return [] if self.learnt_state is None else [self.learnt_state]

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """Compute what the core makes of these columns of its input without memory; by default the features themselves.

        Called once for each distinct frame; :meth:`forward` and :meth:`unroll` take what :meth:`join_inputs` returns
        for every step.
        """
        return x

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """Join what :meth:`project_input` returned for all columns; by default they are concatenated."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """Unroll over L steps from ``state``; return the outputs and the state after the last step."""
        raise NotImplementedError

    def unroll(
        self, x: Float[Tensor, "M F"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """Unroll packed sequences (see :class:`~ppo_tbptt.types.Minibatch`), each from its own ``state``.

        Returns the outputs, and the state after the last step of each sequence. :meth:`forward` is called once for each
        stretch of steps with as many sequences, so nothing is padded, unless ``padded``; a core with a faster way
        overrides this.
        """
        stretches = [(count, len(list(steps))) for count, steps in groupby(sequences_per_step.tolist())]
        outputs, states, begin = [], [], 0
        for number, (count, steps) in enumerate(stretches):
            rows, state = x[begin : begin + steps * count].view(steps, count, -1), state[:count]
            if self.padded:
                ended = (0, 0, 0, stretches[0][0] - count)
                rows, state = F.pad(rows, ended), F.pad(state, ended)
            y, state = self(rows, state)
            outputs.append(y[:, :count].flatten(0, 1))
            begin += steps * count
            going_on = stretches[number + 1][0] if number + 1 < len(stretches) else 0
            states.append(state[going_on:count])
        if len(outputs) == 1:
            return outputs[0], states[0]
        return torch.cat(outputs), torch.cat(states[::-1])

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """Return each layer's gates, between 0 and 1, at M single steps; none by default. Only instruments ask."""
        return []


class NoMemory(Core):
    """The identity, with a state of width 0: PPO without recurrence."""

    def __init__(self, input_size: int, config: object) -> None:
        super().__init__()
        self.state_size = 0
        self.output_size = input_size

    def forward(
        self, x: Float[Tensor, "L B F"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        return x, state

    def unroll(
        self, x: Float[Tensor, "M F"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        return x, state


class Wrapper(Core):
    """A core with something around it; by itself it changes nothing."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.core = core
        self.state_size, self.output_size, self.padded = core.state_size, core.output_size, core.padded
        self.wide_state = core.wide_state

    def initial_state(self, batch: int) -> Float[Tensor, "B D"]:
        """See :meth:`Core.initial_state`."""
        return self.core.initial_state(batch)

    def undecayed(self) -> list[nn.Parameter]:
        """See :meth:`Core.undecayed`."""
        return self.core.undecayed()

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """See :meth:`Core.project_input`."""
        return self.core.project_input(x, columns)

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """See :meth:`Core.join_inputs`."""
        return self.core.join_inputs(parts)

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        return self.core(x, state)

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        return self.core.unroll(x, state, sequences_per_step)

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """See :meth:`Core.gates`."""
        return self.core.gates(x, state)


class Normalized(Wrapper):
    """A core whose output is normalised at every step (Ba et al. 2016, https://arxiv.org/abs/1607.06450)."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        self.norm = nn.LayerNorm(core.output_size)

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        y, state = self.core(x, state)
        return self.norm(y), state

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        y, state = self.core.unroll(x, state, sequences_per_step)
        return self.norm(y), state


class Residual(Wrapper):
    """A core with a shortcut around it (He et al. 2016): its input, projected to the output's size, is added.

    What the agent sees now reaches the heads at once, and memory need not hold it.
    """

    def __init__(self, core: Core, input_size: int) -> None:
        super().__init__(core)
        self.shortcut = nn.Linear(input_size, core.output_size)
        nn.init.orthogonal_(self.shortcut.weight)
        nn.init.zeros_(self.shortcut.bias)

    def project_input(self, x: Float[Tensor, "U _"], columns: slice) -> Float[Tensor, "U _"]:
        """See :meth:`Core.project_input`; the shortcut's projection lies behind the core's."""
        bias = None if columns.start else self.shortcut.bias
        shortcut = F.linear(x, self.shortcut.weight[:, columns], bias)
        return torch.cat((self.core.project_input(x, columns), shortcut), -1)

    def join_inputs(self, parts: Sequence[Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        """See :meth:`Core.join_inputs`."""
        inputs, shortcuts = zip(*map(self._split, parts), strict=True)
        return torch.cat((self.core.join_inputs(inputs), reduce(torch.add, shortcuts)), -1)

    def forward(
        self, x: Float[Tensor, "L B P"], state: Float[Tensor, "B D"]
    ) -> tuple[Float[Tensor, "L B H"], Float[Tensor, "B D"]]:
        """See :meth:`Core.forward`."""
        x, shortcut = self._split(x)
        y, state = self.core(x, state)
        return y + shortcut, state

    def unroll(
        self, x: Float[Tensor, "M P"], state: Float[Tensor, "S D"], sequences_per_step: Int[Tensor, "L"]
    ) -> tuple[Float[Tensor, "M H"], Float[Tensor, "S D"]]:
        """See :meth:`Core.unroll`."""
        x, shortcut = self._split(x)
        y, state = self.core.unroll(x, state, sequences_per_step)
        return y + shortcut, state

    def gates(self, x: Float[Tensor, "M P"], state: Float[Tensor, "M D"]) -> list[Float[Tensor, "M _ _"]]:
        """See :meth:`Core.gates`."""
        return self.core.gates(self._split(x)[0], state)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is the core's of a projected input, and what is the shortcut's."""
        return x[..., : -self.output_size], x[..., -self.output_size :]
