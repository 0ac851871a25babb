"""Batch normalization: moments over everything but the feature axes, remembered for inference."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import running
from jaxnorm.core.epilogue import Epilogue, along
from jaxnorm.core.measure import Measurement
from jaxnorm.core.moments import LocalMoments, promoted
from jaxnorm.core.normalize import normalize, normalize_with
from jaxnorm.core.replicas import Replicas
from jaxnorm.core.running import BatchStats


def train(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    stats: BatchStats,
    *,
    feature_axes: tuple[int, ...],
    measurement: Measurement,
    mask: Bool[Array, "*#shape"] | None,
    decay: Float[Array, ""] | float | None,
    debias: bool,
    unbiased: bool,
    all_replicas: Replicas | None,
    epilogue: Epilogue,
) -> tuple[Inexact[Array, "*shape"], BatchStats]:
    """Normalize with the moments of the batch; the running mean is the guess they start from.

    With virtual batches `all_replicas` are all that hold some of them.
    """
    guess = along(lax.stop_gradient(stats.mean), feature_axes, x.ndim)
    y, measured = normalize(
        x,
        along(scale, feature_axes, x.ndim),
        along(bias, feature_axes, x.ndim),
        measurement=measurement,
        mask=mask,
        guess=guess,
        epilogue=epilogue,
    )
    # Without a mask the count is known here, and is no array that could vary over devices.
    size = measurement.slices.size(x.shape)
    count = size if mask is None and isinstance(size, int) else measured.count
    mean, var = measured.mean, measured.var
    if unbiased:
        var = running.unbiased(var, count)
    if all_replicas is not None:
        share = measured.count / (jnp.asarray(size, var.dtype) * all_replicas.size())
        count, mean, var = _average(all_replicas, feature_axes, share, mean, var, guess)
    shape = stats.mean.shape
    new = running.update(
        stats,
        count if isinstance(count, int) else count.reshape(shape),
        mean.reshape(shape),
        var.reshape(shape),
        decay=decay,
        debias=debias,
    )
    return y, new


def _average(all_replicas: Replicas, feature_axes: tuple[int, ...], share, mean, var, near):
    """Means and variances of all virtual batches, averaged by the share that a mask left of each.

    The mean is that of the whole batch. The variance is the mean variance within a virtual batch,
    which is what the activations were divided by. With them comes the sum of the shares.
    """
    others = tuple(a for a in range(mean.ndim) if a not in feature_axes)
    # Shares, not counts, and at most 1 in sum: a mean of large numbers stays within the range.
    sums = (share, (mean - near) * share.astype(mean.dtype), var * share)
    sums = (jnp.mean(part, axis=others, keepdims=True) for part in sums)
    share, mean, var = all_replicas.sum(*sums)
    n = jnp.where(share > 0, share, 1)
    return share, near + mean / n.astype(mean.dtype), var / n


def evaluate(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    stats: BatchStats,
    *,
    feature_axes: tuple[int, ...],
    epsilon: float,
    epilogue: Epilogue,
) -> Inexact[Array, "*shape"]:
    """Normalize with the running statistics, which carry no gradient."""
    mean, var = (along(lax.stop_gradient(a), feature_axes, x.ndim) for a in (stats.mean, stats.var))
    wide = promoted(x.dtype, mean.dtype, jnp.float32)
    local = LocalMoments.known(mean.astype(wide), var.astype(jnp.finfo(wide).dtype), epsilon)
    return normalize_with(
        x, local, along(scale, feature_axes, x.ndim), along(bias, feature_axes, x.ndim), epilogue
    )
