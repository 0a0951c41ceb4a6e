"""Export of one step of an agent as an ONNX graph: ``(observations, state) -> (logits, value, next state)``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models import Agent
from ppo_tbptt.models.compile import quiet
from ppo_tbptt.run.files import replacing
from ppo_tbptt.runtime.errors import InputError, shorten

TOLERANCE = 1e-3
"""Largest difference between the outputs of graph and agent, absolute and relative."""
PACKAGES = "pip install 'ppo-tbptt[onnx]'"


class ExportError(InputError):
    """Why no graph was written, in one line."""


class Port(NamedTuple):
    """An input or output of the graph: its name, its shape without the batch axis, and NumPy's name of its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Exported(NamedTuple):
    """What :func:`export_onnx` wrote."""

    inputs: list[Port]
    """The observations in the environment's order, then the recurrent state if there is one."""
    outputs: list[Port]
    """Concatenated logits of all action branches, value, and the next recurrent state if there is one."""
    compared: bool
    """Whether onnxruntime was installed to compare it with the agent; otherwise it was only checked for validity."""


class _Step(nn.Module):
    """The agent with positional inputs, and without a state where it has no memory."""

    def __init__(self, agent: Agent, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.agent = agent
        self.keys = keys

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        has_memory = self.agent.core.state_size > 0
        state = inputs[-1] if has_memory else inputs[0].new_zeros(inputs[0].shape[0], 0, dtype=torch.float32)
        output = self.agent.step(dict(zip(self.keys, inputs, strict=False)), state)
        return (output.logits, output.value, *([output.state_out] if has_memory else []))


def export_onnx(policy: Policy, path: Path) -> Exported:
    """Write one step of the agent in float32, for any batch size, and compare the graph with the agent.

    Observations are those of the environment (frames uint8 and channels-last). The state is zero at an episode's
    start. The graph's metadata are strings: ``config`` (TOML), ``env_id``, ``observations`` and ``action_nvec``
    (JSON), ``discrete``, ``state_size``, ``env_steps`` and ``version``.

    Raises:
        ExportError: packages are missing, this torch can't export the agent, or the graph is larger than 2 GiB,
            invalid or different from the agent. Nothing is written then.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (torch's exporter imports it)
    except ImportError as error:
        raise ExportError(f"writing ONNX needs the package {error.name}: {PACKAGES}") from error
    agent = deepcopy(policy.agent).cpu()
    agent.precision = torch.float32
    step = _Step(agent, tuple(policy.spec.obs)).eval()
    inputs, outputs = _ports(policy)
    batch = torch.export.Dim("batch")
    with _as_export_error(path), quiet("torch.onnx", "torch.export"), torch.no_grad():
        program = torch.onnx.export(
            step,
            _example(inputs, batch=2),
            input_names=[port.name for port in inputs],
            output_names=[port.name for port in outputs],
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        model: Any = program.model_proto
    spec = policy.spec
    for key, value in {
        "config": policy.config.to_toml(),
        "env_id": spec.env_id,
        "observations": json.dumps(spec.to_json()["obs"]),
        "action_nvec": json.dumps(list(spec.action_nvec)),
        "discrete": json.dumps(spec.discrete),
        "state_size": str(agent.core.state_size),
        "initial_state": json.dumps(agent.core.initial_state(1)[0].tolist()),
        "env_steps": str(policy.env_steps),
        "version": metadata.version("ppo-tbptt"),
    }.items():
        model.metadata_props.add(key=key, value=value)
    try:
        content = model.SerializeToString()
    except ValueError as error:
        raise ExportError(f"{path}: ONNX files end at 2 GiB, and this agent is larger") from error
    with replacing(path) as file:
        file.write(content)
        file.flush()
        with _as_export_error(path):
            onnx.checker.check_model(file.name, full_check=True)
            compared = _compare(Path(file.name), step, inputs, path)
    return Exported(inputs, outputs, compared)


def _ports(policy: Policy) -> tuple[list[Port], list[Port]]:
    taken = set(policy.spec.obs)

    def port(name: str, *shape: int) -> Port:
        while name in taken:  # names must be unique, and an observation may be called "state"
            name = f"agent_{name}"
        return Port(name, shape, "float32")

    agent = policy.agent
    inputs = [Port(key, array.shape, array.dtype) for key, array in policy.spec.obs.items()]
    outputs = [port("logits", sum(agent.action_nvec)), port("value")]
    if size := agent.core.state_size:
        inputs.append(port("state", size))
        outputs.append(port("next_state", size))
    return inputs, outputs


def _example(ports: list[Port], *, batch: int) -> tuple[Tensor, ...]:
    rng = np.random.default_rng(batch)
    arrays = [
        rng.integers(0, 256, (batch, *port.shape), dtype=np.uint8)
        if port.dtype == "uint8"
        else rng.standard_normal((batch, *port.shape), dtype=np.float32)
        for port in ports
    ]
    return tuple(map(torch.from_numpy, arrays))


def _compare(file: Path, step: _Step, inputs: list[Port], path: Path) -> bool:
    """Compare one step of graph and agent for several batch sizes; return whether onnxruntime is installed."""
    try:
        import onnxruntime
    except ImportError:
        return False
    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        example = _example(inputs, batch=batch)
        with torch.no_grad():
            expected = step(*example)
        fed = {port.name: x.numpy() for port, x in zip(inputs, example, strict=True)}
        for want, found in zip(expected, session.run(None, fed), strict=True):
            if not np.allclose(want.numpy(), found, rtol=TOLERANCE, atol=TOLERANCE):
                raise ExportError(f"{path}: not written, for the graph's outputs are not the agent's")
    return True


@contextmanager
def _as_export_error(path: Path) -> Iterator[None]:
    """Turn what torch's exporter, ONNX's checker or onnxruntime raises into an :class:`ExportError` of one line."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the first cause; the exporter's own message is advice to its developers
            cause = cause.__cause__
        reason = shorten(f"{type(cause).__name__}: {' '.join(str(cause).split())}", 200)
        failed = f"torch {torch.__version__} fails to export this agent; another version of torch may be able to"
        raise ExportError(f"{path}: not written, for {failed} ({reason})") from error
