"""From observations to features. Frames are scaled here and nowhere else."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.config import ModelConfig

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def orthogonal_(layer: Layer, gain: float) -> Layer:
    """Fill ``layer.weight`` with a (semi-)orthogonal matrix times ``gain``, in place (Saxe et al. 2014)."""
    nn.init.orthogonal_(layer.weight, gain)
    return layer


class CNN(nn.Module):
    """Convolutions with ReLU on u8 frames ``[M, X, Y, C]``, and a dense layer if asked for.

    Frames stay channels-last: ``permute`` gives the convolutions the NHWC memory that they want, so no copy is made
    for layout, and the flattened features are in ``(x, y, channel)`` order.

    Args:
        shape: of a frame, ``(X, Y, C)``.
        channels, kernels, strides: of each convolution; the defaults are those of Mnih et al. 2015.
        features: width of the dense layer; None: the flattened output of the convolutions.
        normalize: scale frames by :meth:`fit_normalization` and not by 255.

    Raises:
        ValueError: a frame too small for the convolutions.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        kernels: Sequence[int] = (8, 4, 3),
        strides: Sequence[int] = (4, 2, 1),
        features: int | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        x, y, in_channels = shape
        needed = 1
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            needed = (needed - 1) * stride + kernel
        if min(x, y) < needed:
            raise ValueError(f"frames of {x}x{y} are too small for the CNN, which needs at least {needed}x{needed}")
        layers: list[nn.Module] = []
        for out_channels, kernel, stride in zip(channels, kernels, strides, strict=True):
            layers += [orthogonal_(nn.Conv2d(in_channels, out_channels, kernel, stride), 2**0.5), nn.ReLU(inplace=True)]
            x, y = ((size - kernel) // stride + 1 for size in (x, y))
            in_channels = out_channels
        self.register_buffer("mean", torch.zeros(shape) if normalize else None)
        self.register_buffer("std", torch.tensor(255.0) if normalize else None)
        first, *rest = layers
        assert isinstance(first, nn.Conv2d)
        self.first = first
        self.rest = nn.Sequential(*rest)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.output_size = x * y * in_channels
        self.dense: nn.Module = nn.Identity()
        if features is not None:
            self.dense = nn.Sequential(
                orthogonal_(nn.Linear(self.output_size, features), 2**0.5), nn.ReLU(inplace=True)
            )
            self.output_size = features

    mean: Float[Tensor, "X Y C"] | None
    """Subtracted from every frame; None: nothing is."""
    std: Float[Tensor, ""] | None
    """What they are then divided by; None: 255."""

    @torch.no_grad()
    def fit_normalization(self, frames: UInt8[Tensor, "N X Y C"]) -> None:
        """Centre each pixel on its mean over ``frames``, and scale all alike to unit variance, if that was asked for.

        Most of a picture is the same in all of them. Without this it outweighs in every feature what differs.
        """
        if self.mean is not None and self.std is not None:
            self.mean.copy_(frames.to(self.mean.dtype).mean(0))
            std = (frames - self.mean).square().mean().sqrt()
            self.std.copy_(torch.where(std > 0, std, 255.0))

    def forward(self, frames: UInt8[Tensor, "M X Y C"]) -> Float[Tensor, "M F"]:
        """Encode observations."""
        first = self.first
        # Dividing the few weights instead of the many pixels saves a pass over the largest tensor there is, and so
        # does converting to the precision of the arithmetic at once: bfloat16 holds 0 to 255 exactly.
        kind = frames.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else first.weight.dtype
        x = frames if self.mean is None else frames - self.mean
        scale = 255 if self.std is None else self.std
        x = F.conv2d(x.permute(0, 3, 1, 2).to(dtype), first.weight / scale, first.bias, first.stride)
        return self.dense(self.rest(x).permute(0, 2, 3, 1).flatten(1))


class MLP(nn.Module):
    """Dense layers with ReLU on a vector observation; no sizes at all make it the identity."""

    def __init__(self, size: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("_like", torch.empty(0), persistent=False)  # knows the dtype: weights may be float64
        layers: list[nn.Module] = []
        for hidden in hidden_sizes:
            layers += [orthogonal_(nn.Linear(size, hidden), 2**0.5), nn.ReLU(inplace=True)]
            size = hidden
        self.layers = nn.Sequential(*layers)
        self.output_size = size

    def forward(self, x: Float[Tensor, "M I"]) -> Float[Tensor, "M F"]:
        """Encode observations."""
        return self.layers(x.to(self.get_buffer("_like").dtype))


class Encoder(nn.Module):
    """One encoder for each observation: CNN for rank 3, MLP for rank 1; none for the previous action and reward."""

    def __init__(self, obs_shapes: Mapping[str, tuple[int, ...]], config: ModelConfig) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        self.names: dict[str, str] = {}
        """Of each observation's encoder in ``parts``."""
        self.output_size = 0
        self.columns: dict[str, slice] = {}
        """Of each observation's features in the core's input."""
        for key, shape in obs_shapes.items():
            if len(shape) == 3:
                convolutions = config.cnn_channels, config.cnn_kernels, config.cnn_strides
                last = config.cnn_features, config.normalize_frames
                part = CNN((shape[0], shape[1], shape[2]), *convolutions, *last)
            else:
                part = MLP(shape[0], () if key in config.previous else config.vector_hidden_sizes)
            self.names[key] = name = _module_name(key, self.parts)
            self.parts[name] = part
            self.columns[key] = slice(self.output_size, self.output_size + part.output_size)
            self.output_size += part.output_size

    def fit_normalization(self, obs: Mapping[str, Tensor]) -> None:
        """Fit that of every image to these observations (see :meth:`CNN.fit_normalization`)."""
        for key, x in obs.items():
            part = self.parts[self.names[key]]
            if isinstance(part, CNN):
                part.fit_normalization(x)

    def forward(self, obs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode each observation; their numbers may differ."""
        return {key: self.parts[self.names[key]](x) for key, x in obs.items()}


def _module_name(key: str, taken: nn.ModuleDict) -> str:
    """Return the observation's key, altered where torch can't name a module so: ``type``, ``keys``, ``a.b``."""
    name = key.replace(".", "_")
    while not name or hasattr(taken, name):
        name += "_"
    return name
