"""Encoder, recurrent core and heads as one module; the only place where padding exists."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ppo_tbptt.models.cores import CORES
from ppo_tbptt.models.encoders import Encoder
from ppo_tbptt.models.heads import Heads
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
        vector_hidden_sizes: Sequence[int] = (128,),
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.action_nvec = action_nvec
        self.precision = precision
        self.encoder = Encoder(obs_shapes, cnn_channels=cnn_channels, vector_hidden_sizes=vector_hidden_sizes)
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
        return logits.float(), value.float(), after.float()

    def reset_state(self, state: Float[Tensor, "N D"], start: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """``state`` with the rows where an episode starts replaced by the initial state."""
        return torch.where(start[:, None], self.core.initial_state(len(start)), state)

    def unroll(
        self, obs: Obs, state: Float[Tensor, "S D"], mask: Bool[Tensor, "L S"]
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M"]]:
        """Logits and values of the M valid steps of S sequences, each unrolled from its own ``state``.

        ``obs`` holds valid steps only, in the order of ``mask`` (time first). Encoder and heads never see padding;
        the core does, but only at a sequence's tail, where nothing comes after it.
        """
        with self._autocast():
            features = self.encoder(obs)  # [M, F]
            if len(features) == mask.numel():
                y = self.core(features.view(*mask.shape, -1), state)[0].flatten(0, 1)
            else:
                position = mask.flatten().nonzero().squeeze(1)  # [M], into [L * S]
                padded = features.new_zeros(mask.numel(), features.shape[1]).index_copy(0, position, features)
                y = self.core(padded.view(*mask.shape, -1), state)[0].flatten(0, 1).index_select(0, position)
            logits, value = self.heads(y)
        return logits.float(), value.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16)
