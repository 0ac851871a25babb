"""Flax Linen layers: `flax.linen`'s own, drop-in, around jaxnorm's pure functions.

Same fields, defaults, variables and class names as Flax's, so checkpoints load unchanged. Each
class here subclasses Flax's and keeps its constructor; fields that Flax does not have come last
and are keyword-only. `jaxnorm.layers` says what they are.
"""

from jaxnorm.linen.linear import Conv, Dense
from jaxnorm.linen.normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.linen.wrappers import SpectralNorm, WeightNorm

__all__ = [
    "BatchNorm",
    "Conv",
    "Dense",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
]
