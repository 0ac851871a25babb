"""Flax NNX layers: `flax.nnx`'s own, drop-in, around jaxnorm's pure functions.

Same constructors, defaults, variables and class names as Flax's. Each class here subclasses
Flax's; arguments that Flax does not have come last and are keyword-only. `jaxnorm.layers` says what
they are.
"""

from jaxnorm.nnx.linear import Conv, Linear
from jaxnorm.nnx.normalization import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxnorm.nnx.wrappers import SpectralNorm, WeightNorm

__all__ = [
    "BatchNorm",
    "Conv",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "SpectralNorm",
    "WeightNorm",
]
