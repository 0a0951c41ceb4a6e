"""The encoder compiled by ``torch.compile`` for the update, where most of an image agent's arithmetic is.

Compiling fuses what lies between the convolutions. On the CPU measured that brought nothing: whole iterations ran at
0.94 to 0.99 times the speed without it, in float32 and bfloat16. On a GPU it is unmeasured. Acting stays as it is, for
on a GPU it is one captured graph already.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from ppo_tbptt.models import Agent
from ppo_tbptt.models.plugins import OUT_OF_MEMORY

Encode = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""The encoder, or what is compiled of it."""


class CompileError(RuntimeError):
    """One line: why the encoder was not compiled."""


def compile_encoder(agent: Agent, obs: Mapping[str, Tensor]) -> Encode:
    """Compile the agent's encoder, with its own weights, for any number of observations; for :meth:`Agent.unroll`.

    It is compiled here and now, forward and backward, by a step on ``obs`` (about as many as an update takes at a time)
    that changes neither weights nor random streams. So a missing compiler shows at the start, not in an update, and the
    kernels do not depend on which update came first. Nothing is compiled again: what they were not made for (a single
    observation, say) the encoder does itself. The agent is not changed, so neither are checkpoints, copies and exports.

    Raises:
        CompileError: no compiler, or one that failed.
    """
    devices = [agent.device] if agent.device.type == "cuda" else []
    try:
        with quiet("torch"), torch.random.fork_rng(devices):
            compiled = torch.compile(agent.encoder)
            _try(agent, compiled, obs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # Dynamo, the compilers and the system raise many kinds
        raise CompileError(_reason(error)) from error

    def encode(obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.compiler.set_stance("eager_on_recompile"):
            return compiled(obs)

    return encode


def _try(agent: Agent, encode: Encode, obs: Mapping[str, Tensor]) -> None:
    """Go through an update's forward and backward pass, whose gradients are thrown away."""
    for x in obs.values():
        torch._dynamo.mark_dynamic(x, 0)  # the other axes are the same in every update
    agent.train()
    num = len(next(iter(obs.values())))
    output = agent.unroll(dict(obs), agent.core.initial_state(num), torch.tensor([num]), encode)
    torch.autograd.grad(output.logits.sum() + output.value.sum(), list(agent.parameters()), allow_unused=True)


def _reason(error: Exception) -> str:
    """Return the compiler's own complaint, or what torch says before its advice to developers."""
    text = str(error)
    complaint = next((line for line in text.splitlines() if " error: " in line), text.partition("\n\n")[0])
    return " ".join(complaint.split())[:200] or type(error).__name__


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Suppress warnings, and what these loggers say short of CRITICAL; what fails is raised all the same."""
    levels = {logger: logger.level for logger in map(logging.getLogger, loggers)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
