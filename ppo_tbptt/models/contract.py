"""What training relies on in a recurrent core, checked in one call.

from ppo_tbptt.models.contract import check_core

def test_my_core() -> None:
    check_core(MyCore, MyCore.Config(width=8))
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppo_tbptt.models.cores import Core

STEPS, ENVS, LENGTH = 13, 4, 5


def check_core(core_class: type[Core], config: Any, *, input_size: int = 6, tolerance: float = 1e-4) -> None:
    """Check that a core keeps the contract of :class:`Core`, and that updates recompute what acting computed.

    The core is built anew, with its own initial weights; the global random stream decides them and the data.

    Args:
        core_class: constructed as ``(input_size, config)``.
        config: an instance of its ``Config``, or the config's ``[core]`` for a built-in core.
        input_size: number of features F.
        tolerance: absolute and relative, of float32; of gradients also relative to the largest entry.

    Raises:
        AssertionError: one line about what does not hold.
    """
    core = core_class(input_size, config)
    check = _Check(core, tolerance)
    check.shapes(torch.randn(STEPS, ENVS, input_size))
    check.steps(torch.randn(STEPS, ENVS, input_size))
    check.rows(torch.randn(STEPS, ENVS, input_size))
    check.replay(torch.randn(STEPS, ENVS, input_size), torch.rand(STEPS, ENVS) < 0.2)


@dataclass(frozen=True, slots=True)
class _Check:
    core: Core
    tolerance: float

    def require(self, holds: bool, text: str) -> None:
        if not holds:
            raise AssertionError(f"{type(self.core).__name__}: {text}")

    def equal(self, a: Tensor, b: Tensor, text: str) -> None:
        self.require(a.shape == b.shape and torch.allclose(a, b, rtol=self.tolerance, atol=self.tolerance), text)

    def inputs(self, x: Tensor) -> Tensor:
        """Project features and join them, which must be the same for their columns in two parts."""
        core, size = self.core, x.shape[-1]
        half = size // 2
        whole = core.join_inputs([core.project_input(x, slice(0, size))])
        parts = [
            core.project_input(x[..., :half], slice(0, half)),
            core.project_input(x[..., half:], slice(half, size)),
        ]
        self.equal(core.join_inputs(parts), whole, "project and join must be the same for features in parts")
        return whole

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.core(self.inputs(x.flatten(0, 1)).unflatten(0, x.shape[:2]), state)
        return y, state

    def shapes(self, x: Tensor) -> None:
        core = self.core
        initial = core.initial_state(ENVS)
        self.require(initial.shape == (ENVS, core.state_size), "initial_state(B) must be [B, state_size]")
        self.require(bool((initial == initial[:1]).all()), "initial_state(B) must be the same for all")
        y, state = self.forward(x, initial)
        self.require(y.shape == (STEPS, ENVS, core.output_size), "the output must be [L, B, output_size]")
        self.require(state.shape == initial.shape, "the state returned must be [B, state_size], as that given is")
        self.require(y.dtype == state.dtype == torch.float32, "output and state must be float32 for float32 input")

    @torch.no_grad()
    def steps(self, x: Tensor) -> None:
        """Several steps at once are those steps one by one, and don't change what they are given."""
        core = self.core.eval()
        first = state = self.forward(x, core.initial_state(ENVS))[1]
        kept = first.clone()
        y, last = self.forward(x, first)
        self.require(torch.equal(first, kept), "the state given must not be changed in place")
        for t in range(STEPS):
            out, state = self.forward(x[t : t + 1], state)
            self.equal(out[0], y[t], "L steps in one call must give the outputs of L calls of one step")
        self.equal(state, last, "the state returned must be the one after the last step")

    @torch.no_grad()
    def rows(self, x: Tensor) -> None:
        core = self.core.eval()
        y, state = self.forward(x, core.initial_state(ENVS))
        own, own_state = self.forward(x[:, 1:2], core.initial_state(1))
        self.equal(own, y[:, 1:2], "a row's outputs must not depend on the other rows")
        self.equal(own_state, state[1:2], "a row's state must not depend on the other rows")

    def replay(self, x: Tensor, start: Tensor) -> None:
        """Act through episodes; then unroll them as packed sequences, from the states that were fed."""
        core = self.core.eval()
        fed, after, y = [], [], []
        with torch.no_grad():
            state = self.forward(x, core.initial_state(ENVS))[1]
            for t in range(STEPS):
                state = torch.where(start[t][:, None], core.initial_state(ENVS), state)
                fed.append(state)
                out, state = self.forward(x[t : t + 1], state)
                y.append(out[0])
                after.append(state)
            core.train()
            random = not torch.equal(self.forward(x, fed[0])[0], self.forward(x, fed[0])[0])
        core.train(not random)  # dropout acts in updates alone
        sequences = sorted(_sequences(start), key=lambda s: s[1] - s[2])
        longest = max(end - begin for _, begin, end in sequences)
        packed = [(b + k, n) for k in range(longest) for n, b, end in sequences if b + k < end]
        count = torch.tensor([sum(end - b > k for _, b, end in sequences) for k in range(longest)])
        states = torch.stack([fed[b][n] for n, b, _ in sequences])
        t, n = torch.tensor(packed).T

        inputs = x.clone().requires_grad_()
        replayed, last = core.unroll(self.inputs(inputs[t, n]), states, count)
        self.equal(replayed, torch.stack(y)[t, n], "unroll must recompute the outputs of acting")
        wanted = torch.stack([after[end - 1][n] for n, _, end in sequences])
        self.equal(last, wanted, "unroll must return the state after the last step of each sequence")
        weight = torch.randn_like(x[..., :1]).expand(*x.shape[:2], core.output_size)
        singly = sum((self.forward(inputs[b:e, [n]], fed[b][[n]])[0] * weight[b:e, [n]]).sum() for n, b, e in sequences)
        parameters = [inputs, *core.parameters()]
        pairs = zip(
            torch.autograd.grad((replayed * weight[t, n]).sum(), parameters, allow_unused=True),
            torch.autograd.grad(torch.as_tensor(singly), parameters, allow_unused=True),
            strict=True,
        )
        for a, b in pairs:
            self.require(self.same_gradient(a, b), "gradients of unroll must be those of each sequence alone")

    def same_gradient(self, a: Tensor | None, b: Tensor | None) -> bool:
        """Compare by the largest entry, if that is above 1: sums of large terms are rounded as these are."""
        if a is None or b is None:
            return a is b
        return torch.allclose(a, b, rtol=self.tolerance, atol=self.tolerance * max(1.0, float(b.abs().max())))


def _sequences(start: Tensor) -> list[tuple[int, int, int]]:
    """Cut at starts and after ``LENGTH`` steps: environment, first step, and the one after the last."""
    sequences = []
    for n in range(ENVS):
        begin = 0
        for t in range(1, STEPS + 1):
            if t == STEPS or start[t, n] or t - begin == LENGTH:
                sequences.append((n, begin, t))
                begin = t
    return sequences
