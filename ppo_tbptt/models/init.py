"""Initialisation as in the published MemoryGym baseline: orthogonal weights, the layers' own default biases."""

from typing import TypeVar

from torch import nn

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def orthogonal_(layer: Layer, gain: float) -> Layer:
    """Fill ``layer.weight`` with a (semi-)orthogonal matrix times ``gain``, in place (Saxe et al. 2014)."""
    nn.init.orthogonal_(layer.weight, gain)
    return layer
