"""Reconstruction of the observed frame from the core's output: an auxiliary loss that gives memory more to learn from.

Used with the coefficient 0.1 in published runs (Pleines et al. 2025, "Memory Gym: Towards Endless Tasks to Benchmark
Memory Capabilities of Agents", JMLR; https://github.com/MarcoMeter/neroRL).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.config import ConfigError
from ppo_tbptt.models import Agent
from ppo_tbptt.models.encoders import orthogonal_
from ppo_tbptt.models.heads import at_least_float32
from ppo_tbptt.types import AgentOutput, Frames, Minibatch


class Decoder(nn.Module):
    """A dense layer, then the transposed convolutions of a CNN in reverse order: the logits of a frame's pixels.

    Args:
        input_size: H.
        shape: of a frame, ``(X, Y, C)``.
        cnn: the encoder of such frames.
    """

    def __init__(self, input_size: int, shape: tuple[int, ...], cnn: nn.Module) -> None:
        super().__init__()
        x, y, channels = shape
        layers: list[nn.Module] = []
        for convolution in (module for module in cnn.modules() if isinstance(module, nn.Conv2d)):
            (kernel, _), (stride, _), channels = convolution.kernel_size, convolution.stride, convolution.out_channels
            unread = ((x - kernel) % stride, (y - kernel) % stride)  # pixels that it leaves out at the far edges
            x, y = (x - kernel) // stride + 1, (y - kernel) // stride + 1
            mirrored = nn.ConvTranspose2d(channels, convolution.in_channels, kernel, stride, output_padding=unread)
            layers = [nn.ReLU(inplace=True), orthogonal_(mirrored, 2**0.5), *layers]
        self.smallest = (x, y, channels)
        self.dense = orthogonal_(nn.Linear(input_size, x * y * channels), 2**0.5)
        self.layers = nn.Sequential(*layers)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, y: Float[Tensor, "M H"]) -> Float[Tensor, "M X Y C"]:
        """Return the logits."""
        return self.layers(self.dense(y).unflatten(1, self.smallest).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Reconstruction(nn.Module):
    """Binary cross-entropy between each step's frame / 255 and what a decoder makes of the core's output.

    The mean over pixels and steps; where there are several images, the sum over them. The decoder runs on every step,
    for the core's outputs differ where frames are the same: on a CPU that takes longer than all else in an update.

    Raises:
        ConfigError: the agent observes no image.
    """

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self.images = {key: agent.encoder.names[key] for key, shape in agent.obs_shapes.items() if len(shape) == 3}
        if not self.images:
            observed = ", ".join(agent.obs_shapes)
            raise ConfigError(f"aux.reconstruction_coef: none of the observations ({observed}) is an image; must be 0")
        self.decoders = nn.ModuleDict(
            {
                name: Decoder(agent.core.output_size, agent.obs_shapes[key], agent.encoder.parts[name])
                for key, name in self.images.items()
            }
        )
        self._arithmetic = agent.arithmetic

    def forward(self, batch: Minibatch, output: AgentOutput) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Compute the loss; it has no other figures."""
        losses = []
        for key, name in self.images.items():
            obs = batch.obs[key]
            frames = obs.stacked() if isinstance(obs, Frames) else obs
            with self._arithmetic():
                logits = at_least_float32(self.decoders[name](output.core_output))
            losses.append(F.binary_cross_entropy_with_logits(logits, frames / 255))
        return torch.stack(losses).sum(), {}
