"""Layer, RMS, instance and group normalization: moments over axes of one example, no state."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.affine import along, normalize
from jaxnorm.core.measure import Reduction
from jaxnorm.core.moments import wide_dtype


def per_slice(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    *,
    reduction: Reduction,
    feature_axes: tuple[int, ...],
    mask: Bool[Array, "*#shape"] | None,
    dtype,
) -> Inexact[Array, "*shape"]:
    """Normalize each slice with its own moments."""
    scale, bias = along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim)
    return normalize(x, scale, bias, reduction=reduction, mask=mask, dtype=dtype)[0]


def offset_scale(scale: Inexact[Array, "*features"], offset: float) -> Inexact[Array, "*features"]:
    """``offset + scale`` in float32 at least: in bfloat16, 1 + w rounds w to 8 bits."""
    return scale.astype(wide_dtype(scale.dtype)) + jnp.asarray(offset, wide_dtype(scale.dtype))
