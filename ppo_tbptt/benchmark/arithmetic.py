"""Count the network's floating-point operations, and measure how many per second the device does.

A multiplication and its addition are two operations. Only convolutions and matrix products count (activations, the
optimiser and the loss are passes over memory, not arithmetic).
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.runtime.device import tf32

MEASURE_SECONDS = 2.0
"""About how long a call is timed."""


def seconds_per_call(call: Callable[[], object]) -> float:
    """Return the median time of blocks of calls, on a GPU until it has done its work."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=MEASURE_SECONDS).median


def forward_flop(config: Config, spec: EnvSpec) -> dict[str, int]:
    """Count the operations of one environment's step through encoder, core and heads: ``conv`` and ``matmul``.

    Counted from the operators that torch runs, on a new agent on the CPU. oneDNN is off meanwhile: its LSTM is one
    operator that the counter does not know.
    """
    with torch.random.fork_rng(devices=[]):
        agent = build_agent(config, spec, torch.device("cpu"))
    obs = {key: torch.zeros((1, *array.shape), dtype=getattr(torch, array.dtype)) for key, array in spec.obs.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that oneDNN has no TF32 here
        with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter, torch.no_grad():
            agent.step(obs, agent.core.initial_state(1))
    counts = {str(operator): int(flop) for operator, flop in counter.get_flop_counts()["Global"].items()}
    conv = sum(flop for operator, flop in counts.items() if "conv" in operator)
    return {"conv": conv, "matmul": sum(counts.values()) - conv}


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure operations per second of a large product (``matmul``) and a large convolution (``conv``)."""
    cuda = device.type == "cuda"
    size, batch, channels, side = (8192, 512, 128, 28) if cuda else (1024, 8, 128, 28)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    a, b = random(size, size), random(size, size)
    x = random(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = random(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    conv_flop = 2 * batch * (side - 2) ** 2 * channels**2 * 9
    with torch.no_grad(), tf32(dtype, device):
        return {
            "matmul": 2 * size**3 / seconds_per_call(lambda: a @ b),
            "conv": conv_flop / seconds_per_call(lambda: F.conv2d(x, weight)),
        }
