"""Running statistics: what batch normalization remembers between steps."""

import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float, Inexact, Int

from jaxnorm.core.blocks import reshard_like
from jaxnorm.core.moments import promoted, saturate


class BatchStats(NamedTuple):
    """Running statistics of one batch-normalized layer.

    Attributes:
        mean: running mean, of the feature axes' shape; starts at 0.
        var: running variance, likewise; divides by n, as Flax does (PyTorch: n - 1); starts at 1.
        count: updates so far.

    Example:
        >>> import jaxnorm
        >>> stats = jaxnorm.init_batch_stats(3)
        >>> stats.mean.shape, stats.var.dtype.name, int(stats.count)
        ((3,), 'float32', 0)
    """

    mean: Inexact[Array, "*features"]  # float32; complex64 for complex data
    var: Float[Array, "*features"]  # float32
    count: Int[Array, ""]  # int32  # pyright: ignore[reportIncompatibleMethodOverride]


# An exported program that takes or returns statistics can be written to a file.
export.register_namedtuple_serialization(BatchStats, serialized_name="jaxnorm.BatchStats")


def init_batch_stats(
    num_features: int | tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> BatchStats:
    """Statistics before the first update: mean 0, variance 1, count 0.

    Args:
        num_features: size of the feature axis, or a tuple of sizes for several.
        dtype: dtype of the mean, float32 or complex64; the variance takes its real part's.

    Returns:
        `BatchStats` for `jaxnorm.batch_norm`.

    Raises:
        TypeError: a size that is no int, a dtype that is none.
        ValueError: a negative size, a dtype that is neither floating nor complex.

    Example:
        >>> import jaxnorm
        >>> jaxnorm.init_batch_stats((2, 3)).var.shape
        (2, 3)
    """
    several = isinstance(num_features, tuple | list)
    try:
        shape = tuple(map(operator.index, num_features if several else (num_features,)))
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            "init_batch_stats: num_features must be an int or a tuple of ints, and dtype a dtype; "
            f"got num_features={num_features!r}, dtype={dtype!r}. For example "
            "init_batch_stats(64)."
        ) from None
    if any(size < 0 for size in shape) or not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            "init_batch_stats: sizes must be at least 0, and the dtype floating or complex; got "
            f"num_features={num_features!r}, dtype={dtype}. For example init_batch_stats(64)."
        )
    return BatchStats(
        jnp.zeros(shape, dtype), jnp.ones(shape, jnp.finfo(dtype).dtype), jnp.zeros((), jnp.int32)
    )


def update(
    stats: BatchStats,
    count: Float[Array, "*features"] | int,
    mean: Inexact[Array, "*features"],
    var: Float[Array, "*features"],
    *,
    decay: Float[Array, ""] | float | None,
    debias: bool,
) -> BatchStats:
    """``decay * old + (1 - decay) * batch``, with no gradient, in dtype and layout of the old.

    `count` is the number of elements for each feature. One with no element in the batch keeps its
    statistics; a batch with none at all is not counted.
    """
    keep = _share_kept(stats.count, decay, debias)

    def blend(old, new):
        new = reshard_like(new, old)
        wide = promoted(old.dtype, jnp.float32)
        share = jnp.asarray(keep, jnp.finfo(wide).dtype).astype(wide)
        old_wide, new = lax.stop_gradient((old.astype(wide), saturate(new, wide)))
        blended = saturate(share * old_wide + (1 - share) * new, old.dtype)
        if isinstance(count, int):  # which is known to be positive: a batch is not empty
            return blended
        return jnp.where(reshard_like(count > 0, old), blended, old)

    seen = 1 if isinstance(count, int) else jnp.any(count > 0).astype(stats.count.dtype)
    return BatchStats(blend(stats.mean, mean), blend(stats.var, var), stats.count + seen)


def unbiased(
    var: Float[Array, "*features"], count: Float[Array, "*features"] | int
) -> Float[Array, "*features"]:
    """The variance over n - 1, from that over n = `count`."""
    others = max(count - 1, 1) if isinstance(count, int) else jnp.maximum(count - 1, 1)
    return var * (count / others)


def _share_kept(count, decay, debias: bool):
    """The share of the old statistics that survives the update number count + 1."""
    if decay is None:
        return 1 - 1 / (count.astype(jnp.float32) + 1)
    if not debias:
        return decay
    # The bias-corrected average m_t = (d m'_{t-1} + (1 - d) b_t) / (1 - d^t), written for itself:
    # m_t = m_{t-1} + w_t (b_t - m_{t-1}) with w_t = (1 - d) / (1 - d^t). At d = 1 its limit, 1/t.
    decay = jnp.asarray(decay, jnp.float32)
    step = count.astype(jnp.float32) + 1
    log_decay = jnp.log(jnp.where(decay < 1, decay, 0.5))
    weight = jnp.where(decay < 1, jnp.expm1(log_decay) / jnp.expm1(step * log_decay), 1 / step)
    return 1 - weight
