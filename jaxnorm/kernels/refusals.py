"""Why there is no kernel for a call."""

from importlib import import_module

import jax.numpy as jnp
from jaxtyping import Array

from jaxnorm.kernels.held import Norm
from jaxnorm.kernels.meshes import spread_along
from jaxnorm.kernels.platforms import KERNELS


def anywhere(norm: Norm, x: Array, parameters, mask, save: str) -> str | None:
    """Why no platform has one; None if some may."""
    slices = norm.measurement.slices
    split = () if slices.blocks is None else (slices.blocks[0],)
    whole = (*slices.axes, *split)
    reasons = {
        "it takes no mask": mask is not None,
        "a slice lies on several devices (axis_name)": not slices.replicas.is_single,
        f"it computes in float32, not in {x.dtype}": _wide(x),
        "scale and bias are wider than float32": any(
            p is not None and _wide(p) for p in parameters
        ),
        "the result is wider than float32": jnp.dtype(norm.epilogue.dtype).itemsize > 4,
        "it keeps the input (save='output')": save != "input",
        "an activation must be one of jax.nn's functions": not norm.epilogue.is_constant,
        "groups lie along the last axis": bool(split) and split[0] != x.ndim - 1,
        "a size is symbolic": not all(isinstance(n, int) for n in x.shape),
        "x has no element": 0 in x.shape,
        f"axes {whole} are spread over devices": bool(spread_along(x, whole)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def on(platform: str, norm: Norm, x: Array, parameters) -> str | None:
    """Why that platform has none for a call that some may have; None if it has one."""
    kernels = import_module(KERNELS[platform])
    shapes = [p.shape for p in parameters if p is not None]
    return kernels.refusal(norm, x.shape, x.dtype, shapes)


def _wide(array: Array) -> bool:
    return array.dtype.itemsize > 4 or jnp.iscomplexobj(array)
