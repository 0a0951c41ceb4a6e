"""Encoder, recurrent core and heads as one module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppo_tbptt.config import Config, ConfigError, CoreConfig, ModelConfig
from ppo_tbptt.envs import EnvError, EnvSpec
from ppo_tbptt.models.cores import build_core
from ppo_tbptt.models.encoders import Encoder
from ppo_tbptt.models.heads import Heads, at_least_float32
from ppo_tbptt.runtime.device import pad_rows, resolve_precision, tf32
from ppo_tbptt.types import AgentOutput, Frames, Obs, Projected, per_step


class Agent(nn.Module):
    """A recurrent actor-critic.

    Args:
        obs_shapes: shape of each observation by key; rank 3 is a u8 frame ``(x, y, channel)``, rank 1 an f32 vector.
        action_nvec: number of choices of each action branch; one branch for a Discrete space.
        core: the config's ``[core]``; see :func:`~ppo_tbptt.models.cores.build_core`.
        model: the config's ``[model]``.
        precision: of the arithmetic; weights, state, logits and values are float32 in any case.

    Raises:
        ConfigError: a core that can't be built.
        ValueError: a frame too small for the CNN.
    """

    def __init__(
        self,
        obs_shapes: Mapping[str, tuple[int, ...]],
        action_nvec: tuple[int, ...],
        *,
        core: Any = None,
        model: ModelConfig | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        model = model or ModelConfig()
        self.obs_shapes = dict(obs_shapes)
        self.action_nvec = action_nvec
        self.precision = precision
        self.previous = model.previous
        """Observations that :class:`~ppo_tbptt.envs.PreviousInputs` adds to the environment's own."""
        self.encoder = Encoder(obs_shapes, model)
        self.core = build_core(self.encoder.output_size, core or CoreConfig())
        self.heads = Heads(self.core.output_size, model.hidden_size, action_nvec)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.heads.value.weight.device

    def project(self, obs: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "_ P"]]:
        """Encode observations, and compute what the core makes of them without memory (:meth:`.Core.project_input`)."""
        with self.arithmetic():
            return self._project(self.encoder(obs))

    def _project(self, features: Mapping[str, Tensor]) -> dict[str, Float[Tensor, "_ P"]]:
        # In float32, because gradients of repetitions are added in this type.
        columns = self.encoder.columns
        return {key: at_least_float32(self.core.project_input(x, columns[key])) for key, x in features.items()}

    def step(self, obs: Mapping[str, Tensor | Projected], state: Float[Tensor, "N D"]) -> AgentOutput:
        """Take one step of N environments from ``state``, which is reset already where an episode starts.

        Of frames that were seen before ``obs`` may hold what :meth:`project` made of them.
        """
        with self.arithmetic():
            known = {key: x.values.index_select(0, x.number) for key, x in obs.items() if isinstance(x, Projected)}
            new = {key: x for key, x in obs.items() if isinstance(x, Tensor)}
            y, state_out = self.core(self._join(known | self._project(self.encoder(new)))[None], state)
            return self._output(None, y[0], state_out)

    def reset_state(self, state: Float[Tensor, "N D"], start: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Replace the rows where an episode starts by the initial state."""
        return torch.where(start[:, None], self.core.initial_state(len(start)), state)

    def unroll(
        self,
        obs: Obs,
        state: Float[Tensor, "S D"],
        sequences_per_step: Int[Tensor, "L"],
        encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None,
        *,
        features: bool = True,
        in_loss: Int[Tensor, "C"] | None = None,
        value_gradient_scale: float = 1.0,
    ) -> AgentOutput:
        """Unroll S packed sequences, M steps in all, each from its own ``state``.

        Encoder and the core's projection run once on each frame of a :class:`~ppo_tbptt.types.Frames`.

        Args:
            obs: M observations, packed (see :class:`~ppo_tbptt.types.Minibatch`).
            state: what the core was fed at each sequence's first step.
            sequences_per_step: the packing.
            encode: called in the encoder's place: the same, compiled (see :mod:`ppo_tbptt.models.compile`).
            features: return the features of every step too.
            in_loss: positions among the M of the steps that the heads run on and that are returned; None: all.
            value_gradient_scale: factor on the values' gradient into what policy and value share.
        """
        with self.arithmetic():
            encoded, x = self._encode(obs, self.encoder if encode is None else encode)
            y, state_out = self.core.unroll(x, state, sequences_per_step)
            by_step = torch.cat([per_step(encoded[key], obs[key]) for key in self.obs_shapes], 1) if features else None
            if in_loss is not None:
                y = y.index_select(0, in_loss)
                by_step = None if by_step is None else by_step.index_select(0, in_loss)
            return self._output(by_step, y, state_out, value_gradient_scale, rows=64)

    def core_input(self, obs: Obs) -> Float[Tensor, "M P"]:
        """Compute what :meth:`unroll` gives to the core for M observations, in any order."""
        with self.arithmetic():
            return self._encode(obs, self.encoder)[1]

    def _encode(
        self, obs: Obs, encode: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "M P"]]:
        """Return the features by key, of each frame of a table once, and the core's input of every step."""
        encoded = encode({key: x.table if isinstance(x, Frames) else x for key, x in obs.items()})
        return encoded, self._join({key: per_step(x, obs[key]) for key, x in self._project(encoded).items()})

    def _join(self, projected: Mapping[str, Float[Tensor, "M _"]]) -> Float[Tensor, "M P"]:
        return self.core.join_inputs([projected[key] for key in self.obs_shapes])

    def _output(
        self,
        features: Float[Tensor, "M F"] | None,
        y: Float[Tensor, "M H"],
        state_out: Float[Tensor, "S D"],
        value_gradient_scale: float = 1.0,
        rows: int = 1,
    ) -> AgentOutput:
        """Run the heads, on a multiple of ``rows`` rows; 1 in a step, which may be exported with any number of them."""
        logits, value = self.heads(pad_rows(y, rows) if rows > 1 else y, value_gradient_scale)
        if rows > 1:
            logits, value = logits[: len(y)], value[: len(y)]
        return AgentOutput(
            logits=at_least_float32(logits),
            value=at_least_float32(value),
            features=features,
            core_output=y,
            state_out=at_least_float32(state_out),
        )

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Prepare for many calls of :meth:`step` with the same weights: no dropout, no gradients.

        In bfloat16 the weights are converted once, not at every step, which is half of a step's time on a CPU.
        """
        self.eval()
        with torch.no_grad(), self.arithmetic():
            yield

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Compute in the agent's precision: forward passes only, as autocast is not meant for backward ones."""
        kind = self.device.type
        # A graph must convert the weights itself: those converted outside of it are gone, or old, when it is replayed.
        captured = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        enabled = self.precision == torch.bfloat16
        autocast = torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=not captured)
        with autocast, tf32(self.precision, self.device):
            yield


def build_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent:
    """Build the config's agent for an environment, on ``device``.

    Raises:
        ConfigError: a network that does not fit the environment, or a core that can't be built.
    """
    for name in config.model.previous:
        if name not in spec.obs:
            text = f"model.{name}: true, but the environments that were handed in have no observation {name!r}"
            raise ConfigError(f"{text}; must be false, or they must be in ppo_tbptt.envs.PreviousInputs")
    try:
        agent = Agent(
            {key: array.shape for key, array in spec.obs.items()},
            spec.action_nvec,
            core=config.core,
            model=config.model,
            precision=resolve_precision(config.precision, device),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"env.id: {spec.env_id!r}: {error}") from error
    return agent.to(device)


def check_fits(agent: Agent, spec: EnvSpec) -> None:
    """Check that an environment's observations and actions are those that the agent was built for.

    Raises:
        EnvError: they are not.
    """
    shapes = {key: array.shape for key, array in spec.obs.items()}
    if shapes != agent.obs_shapes or spec.action_nvec != agent.action_nvec:
        raise EnvError(
            f"{spec.env_id}: observations {shapes} and {spec.action_nvec} actions don't fit this agent, which was "
            f"trained on {agent.obs_shapes} and {agent.action_nvec}"
        )
