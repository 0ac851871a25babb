"""Normalization for JAX: exact, fast, distributed, observable.

Pure functions live here; Flax layers in `jaxnorm.linen` and `jaxnorm.nnx`, training steps in
`jaxnorm.training`, the NumPy oracle in `jaxnorm.testing`. Importing this package loads no Flax
module and starts no backend.
"""

from jaxnorm.core.moments import Moments
from jaxnorm.core.running import BatchStats, init_batch_stats
from jaxnorm.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    rms_norm,
    standardize_weight,
)
from jaxnorm.kernels import explain

__version__ = "0.1.0"

__all__ = [
    "BatchStats",
    "Moments",
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "explain",
    "group_norm",
    "init_batch_stats",
    "instance_norm",
    "layer_norm",
    "moments",
    "rms_norm",
    "standardize_weight",
]
