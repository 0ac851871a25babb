"""Batch normalization: moments over everything but the feature axes, remembered for inference."""

from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import running
from jaxnorm.core.affine import along, normalize, normalize_with
from jaxnorm.core.measure import LocalMoments, Reduction
from jaxnorm.core.moments import wide_dtype
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
    new = running.update(
        stats, *(a.reshape(shape) for a in (measured.count, measured.mean, measured.var)),
        decay=decay, debias=debias, unbiased=unbiased,
    )  # fmt: skip
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
    wide = wide_dtype(x.dtype)
    local = LocalMoments.known(mean.astype(wide), var.astype(mean.real.dtype), epsilon)
    return normalize_with(
        x, local, along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim), dtype
    )
