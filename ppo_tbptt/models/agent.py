"""Encoder, recurrent core and heads as one module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ppo_tbptt.config import Config, ConfigError, CoreConfig
from ppo_tbptt.envs import EnvError, EnvSpec
from ppo_tbptt.models.cores import CORES
from ppo_tbptt.models.encoders import Encoder
from ppo_tbptt.models.heads import Heads, at_least_float32
from ppo_tbptt.runtime.device import prepare_precision
from ppo_tbptt.types import Obs


class Agent(nn.Module):
    """A recurrent actor-critic.

    Args:
        obs_shapes: shape of each observation by key; rank 3 is a u8 frame ``(x, y, channel)``, rank 1 an f32 vector.
        action_nvec: number of choices of each action branch; one branch for a Discrete space.
        precision: of the arithmetic; weights, state and outputs are float32 in any case.

    Raises:
        ValueError: a frame too small for the CNN.
    """

    def __init__(
        self,
        obs_shapes: Mapping[str, tuple[int, ...]],
        action_nvec: tuple[int, ...],
        *,
        core: str = "gru",
        core_hidden_size: int = 512,
        num_layers: int = 1,
        dropout: float = 0.0,
        hidden_size: int = 512,
        cnn_channels: tuple[int, int, int] = (32, 64, 64),
        cnn_features: int | None = None,
        vector_hidden_sizes: Sequence[int] = (128,),
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.obs_shapes = dict(obs_shapes)
        self.action_nvec = action_nvec
        self.precision = precision
        self.encoder = Encoder(
            obs_shapes,
            cnn_channels=cnn_channels,
            cnn_features=cnn_features,
            vector_hidden_sizes=vector_hidden_sizes,
        )
        self.core = CORES[core](self.encoder.output_size, core_hidden_size, num_layers, dropout)
        self.heads = Heads(self.core.output_size, hidden_size, action_nvec)

    @property
    def device(self) -> torch.device:
        return self.heads.value.weight.device

    def step(
        self, obs: Obs, state: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N"], Float[Tensor, "N D"]]:
        """One step of N environments: logits, values and the state after the step."""
        with self._autocast():
            y, after = self.core(self.encoder(obs)[None], state)
            logits, value = self.heads(y[0])
        return at_least_float32(logits), at_least_float32(value), at_least_float32(after)

    def reset_state(self, state: Float[Tensor, "N D"], start: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """``state`` with the rows where an episode starts replaced by the initial state."""
        return torch.where(start[:, None], self.core.initial_state(len(start)), state)

    def unroll(
        self,
        obs: Obs,
        state: Float[Tensor, "S D"],
        batch_sizes: Int[Tensor, "L"],
        encode: Callable[[Obs], Tensor] | None = None,
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M"]]:
        """Logits and values of the M steps of S sequences, each unrolled from its own ``state``.

        ``obs`` is packed (see :class:`~ppo_tbptt.types.Minibatch`): encoder and heads never see padding. ``encode`` is
        called in the encoder's place: the same, compiled (see :mod:`ppo_tbptt.models.compile`).
        """
        with self._autocast():
            features = self.encoder(obs) if encode is None else encode(obs)
            logits, value = self.heads(self.core.unroll(features, state, batch_sizes))
        return at_least_float32(logits), at_least_float32(value)

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Around many calls of :meth:`step` with the same weights: no dropout, no gradients.

        In bfloat16 the weights are converted once, not at every step, which is half of a step's time on a CPU.
        """
        self.eval()
        with torch.no_grad(), self._autocast():
            yield

    def _autocast(self) -> torch.autocast:
        kind = self.device.type
        # A graph must convert the weights itself: those converted outside of it are gone, or old, when it is replayed.
        captured = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        enabled = self.precision == torch.bfloat16
        return torch.autocast(kind, torch.bfloat16, enabled=enabled, cache_enabled=not captured)


def build_agent(config: Config, spec: EnvSpec, device: torch.device) -> Agent:
    """On ``device``, in the config's precision, for which the process is prepared.

    Raises:
        ConfigError: a network that does not fit the environment.
    """
    if not isinstance(config.core, CoreConfig):
        raise ConfigError(f"core.kind: {config.core.kind!r}: cores of other packages can't be built yet")
    try:
        agent = Agent(
            {key: array.shape for key, array in spec.obs.items()},
            spec.action_nvec,
            core=config.core.kind,
            core_hidden_size=config.core.hidden_size,
            num_layers=config.core.num_layers,
            dropout=config.core.dropout,
            hidden_size=config.model.hidden_size,
            cnn_channels=config.model.cnn_channels,
            cnn_features=config.model.cnn_features,
            vector_hidden_sizes=config.model.vector_hidden_sizes,
            precision=prepare_precision(config.precision, device),
        )
    except ValueError as error:
        raise ConfigError(f"env.id: {spec.env_id!r}: {error}") from error
    return agent.to(device)


def check_fits(agent: Agent, spec: EnvSpec) -> None:
    """Raises:
    EnvError: the environment's observations or actions are not those that the agent was built for.
    """
    shapes = {key: array.shape for key, array in spec.obs.items()}
    if shapes != agent.obs_shapes or spec.action_nvec != agent.action_nvec:
        raise EnvError(
            f"{spec.env_id}: observations {shapes} and {spec.action_nvec} actions don't fit this agent, which was "
            f"trained on {agent.obs_shapes} and {agent.action_nvec}"
        )
