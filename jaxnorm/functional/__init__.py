"""The public pure functions: check the arguments, say what is a slice, call the mathematics."""

from jaxnorm.functional.add import add_layer_norm, add_rms_norm
from jaxnorm.functional.batch import batch_norm
from jaxnorm.functional.group import group_norm
from jaxnorm.functional.layer import instance_norm, layer_norm, rms_norm
from jaxnorm.functional.moments import moments
from jaxnorm.functional.weight import standardize_weight

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "rms_norm",
    "standardize_weight",
]
