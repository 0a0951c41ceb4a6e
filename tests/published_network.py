"""Weights of the published MemoryGym baseline (recurrent-ppo-truncated-bptt, one GRU layer) as this package's."""

from collections.abc import Mapping

import torch
from torch import Tensor

_RENAMED = {
    "conv1": "encoder.parts.obs.first",
    "conv2": "encoder.parts.obs.rest.1",
    "conv3": "encoder.parts.obs.rest.3",
    "recurrent_layer": "core.rnn",
    "lin_hidden": "heads.hidden",
    "lin_policy": "heads.policy_hidden",
    "lin_value": "heads.value_hidden",
    "policy_branches": "heads.policy",
    "value": "heads.value",
}
_REQUIRED = tuple(
    f"{name}.{part}"
    for name in _RENAMED
    if name not in ("recurrent_layer", "policy_branches")
    for part in ("weight", "bias")
)


def convert_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an :class:`~ppo_tbptt.models.Agent` with image observations from the published model's.

    All shapes are the same. Features are flattened as (channel, x, y) there and as (x, y, channel) here, so the
    inputs of the recurrent layer are permuted.

    Raises:
        ValueError: a weight is missing, or one is of unknown name.
    """
    missing = [name for name in _REQUIRED if name not in state_dict]
    if missing:
        raise ValueError(f"not the published model's weights: {', '.join(missing)} missing")
    converted = {}
    for name, tensor in state_dict.items():
        head, _, rest = name.partition(".")
        if head not in _RENAMED:
            raise ValueError(f"not the published model's weights: {name!r} is unknown")
        if name == "recurrent_layer.weight_ih_l0":
            channels = state_dict["conv3.weight"].shape[0]
            side = round((tensor.shape[1] // channels) ** 0.5)
            tensor = tensor.view(-1, channels, side, side).permute(0, 2, 3, 1).flatten(1)
        converted[f"{_RENAMED[head]}.{rest}"] = tensor.to(memory_format=torch.contiguous_format)
    return converted
