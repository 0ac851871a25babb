"""Batch normalization, the one family with a state."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core import batch
from jaxnorm.core.arguments import Axes
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.running import BatchStats
from jaxnorm.core.slices import Slices
from jaxnorm.distributed.axes import AxisName, check_synchronized, named_axis
from jaxnorm.distributed.virtual import virtual_batches
from jaxnorm.functional.prepare import DType
from jaxnorm.kernels.dispatch import kernel_for


def batch_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None,
    bias: Inexact[Array, "*features"] | None,
    stats: BatchStats,
    *,
    training: bool,
    feature_axis: Axes = -1,
    decay: Float[Array, ""] | float | None = 0.99,
    epsilon: float = 1e-5,
    activation: Callable | None = None,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    virtual_batch_size: int | None = None,
    unbiased: bool = False,
    debias: bool = False,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "*shape"], BatchStats]:
    r"""Batch normalization: each feature over the examples and positions of a batch.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training :math:`\mu` and :math:`\sigma^2` (biased) are the moments of the batch over all
    axes but the feature axes, and the new running statistics are ``decay * old +
    (1 - decay) * batch``. In evaluation they are the running statistics, which come back as they
    went in. A second call counts nothing twice: the state changes only where the caller stores the
    result.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape with a feature axis.
        scale: gamma, of the feature axes' shape; None for 1.
        bias: beta, likewise; None for 0.
        stats: running statistics, see `init_batch_stats`. In training the running mean is also
            where the search for the batch mean starts, so with `axis_name` it must be the same on
            all members that share a batch, as synchronized statistics are.
        training: True in training, False in evaluation; a Python bool.
        feature_axis: the axes that carry parameters, an int or a tuple (then parameters and
            statistics have one dimension for each, in ascending order of axis).
        decay: share of the old statistics that is kept (Flax: momentum; PyTorch's momentum is 1 -
            decay); a number in [0, 1] or a scalar array. None: the cumulative average, equal
            weight for every update.
        epsilon: added to the variance, inside the root.
        activation: an elementwise function, applied before the one rounding to `dtype`; what it is
            applied to is recomputed in the backward pass, not kept.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All elements are
            normalized.
        axis_name: a named axis (or several), bound by `vmap`, `pmap` or `shard_map`, along which
            the batch continues. One all-reduce of count-weighted moments. Under `jit` over sharded
            arrays leave it out: the statistics are those of the global batch already.
        axis_index_groups: normalize within groups of that axis's indices only; the running
            statistics are then those of the member's own group. With check_vma=True the moments of
            its members are gathered within a group; groups of unequal sizes, and groups under
            `vmap`, gather them from the whole axis.
        virtual_batch_size: normalize over this many consecutive examples (entries of the first
            axis that carries no features), whatever the number of replicas: a replica's share is
            split where it is larger, replicas are grouped where it is smaller. `jit` over sharded
            arrays splits the global batch alike. Running statistics are synchronized over all of
            `axis_name`: means and variances of all virtual batches, averaged by their counts, as
            one update. That variance is the one within a virtual batch, which the activations
            were divided by; see Hoffer et al. 2017 ("ghost" batches).
        unbiased: keep the variance over n - 1 as running variance, as PyTorch does. The batch is
            normalized with the biased one in any case.
        debias: bias-corrected running statistics: the exponential average of the batches alone,
            free of the initial 0 and 1 (weight ``(1 - decay) / (1 - decay ** updates)``).
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose, see `jaxnorm.explain`) or "xla"; "pallas" is refused, since
            no kernel is written for batch normalization; "two_pass" for the textbook's two passes
            with a rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`, and the new `BatchStats`, in the dtypes of the old and without
        gradient. A feature whose elements are all equal, or all masked out, gives exactly `bias`;
        in the latter case its running statistics stay as they are.

    Raises:
        TypeError: arrays of integers, `training` that is no Python bool, real statistics for
            complex data.
        ValueError: parameters or statistics not of the feature axes' shape, an empty batch in
            training, an axis out of range, a mask that does not broadcast, `epsilon` or `decay`
            out of range, an `axis_name` that is not bound, groups that do not split the axis, a
            `virtual_batch_size` that does not divide the batch, ``implementation="pallas"``, a
            batch that is sharded over an axis of a mesh (by its type, with check_vma=True) which
            `axis_name` leaves out.

    Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, algorithms 1 and 2. Hoffer, Hubara & Soudry, "Train longer,
    generalize better", 2017, algorithm 1, for virtual batches.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> stats = jaxnorm.init_batch_stats(2)
        >>> y, stats = jaxnorm.batch_norm(x, None, None, stats, training=True, decay=0.5)
        >>> y.round(3).tolist(), stats.mean.tolist()
        ([[-1.0, -1.0], [1.0, 1.0]], [1.0, 10.0])
    """
    op = "batch_norm"
    x = check.inexact(op, "x", x)
    features = check.axes(op, "feature_axis", feature_axis, x)
    reduced = tuple(a for a in range(x.ndim) if a not in features)
    scale = check.parameter(op, "scale", scale, x, features)
    bias = check.parameter(op, "bias", bias, x, features)
    stats = _checked_stats(op, stats, x, features)
    training = check.flag(op, "training", training)
    unbiased, debias = check.flag(op, "unbiased", unbiased), check.flag(op, "debias", debias)
    decay = check.decay_of(op, decay)
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-5")
    mask = check.mask_of(op, mask, x)
    two_pass = check.implementation_of(op, implementation)
    epilogue = Epilogue(
        check.result_dtype(op, x, scale, bias, dtype=dtype),
        activation=check.activation_of(op, activation),
    )
    # No kernel is written for it. The call refuses "pallas", and is recorded where `explain` asks.
    kernel_for(op, implementation, x)
    if not training:
        y = batch.evaluate(
            x, scale, bias, stats, feature_axes=features, epsilon=epsilon, epilogue=epilogue
        )
        return y, stats
    if not reduced and axis_name is None:
        raise ValueError(
            f"{op}: a batch has an axis beside the features; got x.shape={x.shape} with "
            f"feature_axis={feature_axis}. Add the batch axis, x[None]; or, where vmap holds it, "
            "give that axis's axis_name."
        )
    check.not_empty(op, x, reduced)
    replicas = named_axis(op, axis_name, axis_index_groups)
    check_synchronized(op, x, stats.mean, axis_name)
    slices = Slices(reduced, replicas=replicas)
    all_replicas = None
    if virtual_batch_size is not None:
        if axis_index_groups is not None:
            raise ValueError(
                f"{op}: virtual_batch_size forms its own groups of replicas; got "
                f"virtual_batch_size={virtual_batch_size} with axis_index_groups="
                f"{axis_index_groups}. Leave out one of the two."
            )
        whole, slices = slices, virtual_batches(op, virtual_batch_size, x.shape, slices)
        all_replicas = None if slices == whole else replicas
    return batch.train(
        x,
        scale,
        bias,
        stats,
        feature_axes=features,
        measurement=Measurement(slices, epsilon, two_pass=two_pass),
        mask=mask,
        decay=decay,
        debias=debias,
        unbiased=unbiased,
        all_replicas=all_replicas,
        epilogue=epilogue,
    )


def _checked_stats(op: str, stats, x, features) -> BatchStats:
    if not (isinstance(stats, tuple) and len(stats) == len(BatchStats._fields)):
        raise TypeError(
            f"{op}: stats must be jaxnorm.BatchStats(mean, var, count); got "
            f"{type(stats).__name__}. Start from jaxnorm.init_batch_stats(num_features)."
        )
    mean = check.statistic(op, "stats.mean", stats[0], x, features)
    var = check.statistic(op, "stats.var", stats[1], x, features)
    if jnp.iscomplexobj(x) and not jnp.iscomplexobj(mean):
        raise TypeError(
            f"{op}: the running mean of complex data is complex; got x.dtype={x.dtype} and "
            f"stats.mean.dtype={mean.dtype}. Start from init_batch_stats(num_features, "
            "dtype=jnp.complex64)."
        )
    count = jnp.asarray(stats[2])
    if count.shape != () or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(
            f"{op}: stats.count is one integer, the number of updates; got an array of "
            f"shape={count.shape}, dtype={count.dtype}. Start from init_batch_stats(num_features)."
        )
    return BatchStats(mean, var, count)
