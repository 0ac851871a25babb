"""Batch normalization: moments over everything but the feature axes, remembered for inference."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import running
from jaxnorm.core.affine import along, normalize, normalize_with
from jaxnorm.core.measure import LocalMoments, Reduction
from jaxnorm.core.moments import promoted
from jaxnorm.core.running import BatchStats


def train(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    stats: BatchStats,
    *,
    feature_axes: tuple[int, ...],
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    decay: Float[Array, ""] | float | None,
    debias: bool,
    unbiased: bool,
    dtype,
) -> tuple[Inexact[Array, "*shape"], BatchStats]:
    """Normalize with the moments of the batch; the running mean is the guess they start from."""
    guess = along(lax.stop_gradient(stats.mean), feature_axes, x.ndim)
    y, measured = normalize(
        x,
        along(scale, feature_axes, x.ndim),
        along(bias, feature_axes, x.ndim),
        reduction=reduction,
        mask=mask,
        guess=guess,
        dtype=dtype,
    )
    shape = stats.mean.shape
    # Without a mask the count is known here, and is no array that could vary over devices.
    size = reduction.size(x.shape)
    known = mask is None and isinstance(size, int)
    new = running.update(
        stats,
        size if known else measured.count.reshape(shape),
        measured.mean.reshape(shape),
        measured.var.reshape(shape),
        decay=decay,
        debias=debias,
        unbiased=unbiased,
    )
    return y, new


def evaluate(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    stats: BatchStats,
    *,
    feature_axes: tuple[int, ...],
    epsilon: float,
    dtype,
) -> Inexact[Array, "*shape"]:
    """Normalize with the running statistics, which carry no gradient."""
    mean, var = (along(lax.stop_gradient(a), feature_axes, x.ndim) for a in (stats.mean, stats.var))
    wide = promoted(x.dtype, mean.dtype, jnp.float32)
    local = LocalMoments.known(mean.astype(wide), var.astype(jnp.finfo(wide).dtype), epsilon)
    return normalize_with(
        x, local, along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim), dtype
    )
