"""Additions of jaxnorm's layers to Flax's, said once for Linen and for NNX.

A layer of `jaxnorm.linen` or `jaxnorm.nnx` subclasses Flax's and keeps its constructor, its
variables and its names. The class there holds the variables and passes them on, with itself, to a
function of this package. The function reads the layer's fields, which have the same names in both
libraries, checks what Flax leaves unchecked, and calls the pure functions.

`norms` holds the five normalizations of activations; `weights` the layers that normalize weights.
Nothing here imports Flax.
"""

from jaxnorm.layers.norms import (
    AffineNormFields,
    BatchNormFields,
    NormFields,
    SavingNormFields,
)
from jaxnorm.layers.weights import KernelFields

__all__ = [
    "AffineNormFields",
    "BatchNormFields",
    "KernelFields",
    "NormFields",
    "SavingNormFields",
]
