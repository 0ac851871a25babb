"""The public pure functions: check the arguments, say what is a slice, call the mathematics."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core import batch, group, layer
from jaxnorm.core.arguments import Axes
from jaxnorm.core.measure import Reduction, measure
from jaxnorm.core.moments import Moments
from jaxnorm.core.running import BatchStats
from jaxnorm.distributed import AxisName, named_axis

DType = jax.typing.DTypeLike


def moments(
    x: Inexact[Array, "*shape"],
    axis: Axes,
    *,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
) -> Moments:
    r"""Count, mean and summed squared deviation of `x` over some axes.

    .. math:: n, \quad \bar x = \frac1n \sum_i x_i, \quad M_2 = \sum_i |x_i - \bar x|^2

    Exact at any offset of the data: squares are taken of shifted data, in one read of `x`.

    Args:
        x: floating or complex numbers, any shape.
        axis: the axes to reduce, an int or a tuple.
        mask: broadcasts to `x`; nonzero elements count. None: all do.
        axis_name: a named axis (or several) over which the slices go on, bound by `vmap`, `pmap`
            or `shard_map`; the moments are those of all its members together, merged by count.
        axis_index_groups: merge within groups of that axis's indices only, as in `jax.lax.psum`.

    Returns:
        `Moments`, each field of the shape of `x` without the reduced axes, float32 at least. A
        slice with no element has count, mean and m2 of 0.

    Raises:
        TypeError: `x` is no array of floating or complex numbers.
        ValueError: an axis out of range or named twice, a mask that does not broadcast, an
            `axis_name` that is not bound.

    Source: Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, section 3
    (shifted data).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> m = jaxnorm.moments(jnp.array([[10000.0, 10002.0], [1.0, 1.0]]), -1)
        >>> m.mean.tolist(), m.m2.tolist()
        ([10001.0, 1.0], [2.0, 0.0])
    """
    op = "moments"
    x = check.inexact(op, "x", x)
    axes = check.axes(op, "axis", axis, x)
    mask = check.mask_of(op, mask, x)
    reduction = Reduction(axes, replicas=named_axis(op, axis_name, axis_index_groups))
    check.not_empty(op, x, axes)
    return measure(x, reduction, mask).as_moments(axes)


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
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    virtual_batch_size: int | None = None,
    unbiased: bool = False,
    debias: bool = False,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> tuple[Inexact[Array, "*shape"], BatchStats]:
    r"""Batch normalization.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training :math:`\mu` and :math:`\sigma^2` (biased) are the moments of the batch over all
    axes but the feature axes, and the new running statistics are ``decay * old +
    (1 - decay) * batch``. In evaluation they are the running statistics, which come back as they
    went in. Calling twice counts nothing twice: only who stores the result changes the state.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape with a feature axis.
        scale: gamma, of the feature axes' shape; None for 1.
        bias: beta, likewise; None for 0.
        stats: running statistics, see `init_batch_stats`. In training the running mean is also
            where the search for the batch mean starts, so with `axis_name` it must be the same on
            all members, as synchronized statistics are.
        training: which of the two; a Python bool.
        feature_axis: the axes that carry parameters, an int or a tuple (then parameters and
            statistics have one dimension for each, in ascending order of axis).
        decay: share of the old statistics that is kept (Flax: momentum; PyTorch's momentum is 1 -
            decay); a number in [0, 1] or a scalar array. None: the cumulative average, equal
            weight for every update.
        epsilon: added to the variance, inside the root.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All elements are
            normalized.
        axis_name: a named axis (or several), bound by `vmap`, `pmap` or `shard_map`, over which
            the batch goes on. One all-reduce of count-weighted moments. Under `jit` over sharded
            arrays leave it out: the statistics are those of the global batch already.
        axis_index_groups: normalize within groups of that axis's indices only.
        virtual_batch_size: not available in this version.
        unbiased: keep the variance over n - 1 as running variance, as PyTorch does. The batch is
            normalized with the biased one in any case.
        debias: bias-corrected running statistics: the exponential average of the batches alone,
            free of the initial 0 and 1 (weight ``(1 - decay) / (1 - decay ** updates)``).
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose) or "xla"; "two_pass" for the textbook's two passes with a
            rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`, and the new `BatchStats`, in the dtypes of the old and without
        gradient. A feature whose elements are all equal, or all masked out, gives exactly `bias`;
        in the latter case its running statistics stay as they are.

    Raises:
        TypeError: arrays of integers, `training` that is no Python bool, real statistics for
            complex data.
        ValueError: parameters or statistics not of the feature axes' shape, an empty batch in
            training, an axis out of range, a mask that does not broadcast, `epsilon` or `decay`
            out of range, an `axis_name` that is not bound.

    Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, algorithms 1 and 2.

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
    if virtual_batch_size is not None:
        raise ValueError(
            f"{op}: virtual_batch_size={virtual_batch_size} is not available in this version. "
            "Leave it at None; to normalize over parts of a batch, reshape x and use jax.vmap."
        )
    dtype = check.result_dtype(op, x, scale, bias, dtype=dtype)
    if not training:
        y = batch.evaluate(
            x, scale, bias, stats, feature_axes=features, epsilon=epsilon, dtype=dtype
        )
        return y, stats
    if not reduced:
        raise ValueError(
            f"{op}: a batch has an axis beside the features; got x.shape={x.shape} with "
            f"feature_axis={feature_axis}. Add the batch axis, x[None], or name fewer feature axes."
        )
    check.not_empty(op, x, reduced)
    replicas = named_axis(op, axis_name, axis_index_groups)
    return batch.train(
        x,
        scale,
        bias,
        stats,
        feature_axes=features,
        reduction=Reduction(reduced, epsilon, replicas, two_pass=two_pass),
        mask=mask,
        decay=decay,
        debias=debias,
        unbiased=unbiased,
        dtype=dtype,
    )


def layer_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None = None,
    bias: Inexact[Array, "*features"] | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Layer normalization.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the mean and biased variance of each slice over `axis`.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape.
        scale: gamma, of the shape of the feature axes in ascending order; None for 1.
        bias: beta, likewise; None for 0.
        axis: the axes to reduce, an int or a tuple.
        feature_axis: the axes that carry parameters; None: those of `axis`.
        epsilon: added to the variance, inside the root.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All are normalized.
        axis_name: a named axis over which each slice goes on, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose) or "xla"; "two_pass" for the textbook's two passes with a
            rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`. A slice of equal elements, or with none, gives exactly `bias`.

    Raises:
        TypeError: arrays of integers, numbers that are no Python numbers.
        ValueError: parameters not of the feature axes' shape, an axis out of range or named
            twice, an empty slice, a mask that does not broadcast, a negative `epsilon`, an
            `axis_name` that is not bound.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, equation (4).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> print(jaxnorm.layer_norm(jnp.array([1.0, 2.0, 3.0]), epsilon=0.0).round(3))
        [-1.225  0.     1.225]
    """
    op = "layer_norm"
    x = check.inexact(op, "x", x)
    reduced = check.axes(op, "axis", axis, x)
    features = reduced if feature_axis is None else check.axes(op, "feature_axis", feature_axis, x)
    return _per_slice(
        op, x, scale, bias, reduced, features, epsilon, mask, axis_name, axis_index_groups, dtype,
        implementation,
    )  # fmt: skip


def rms_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Root mean square normalization.

    .. math::
        y = (\text{offset} + \gamma) \frac{x}{\sqrt{\langle |x|^2 \rangle + \epsilon}}

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape.
        scale: gamma, of the shape of the feature axes in ascending order; None for 1.
        axis: the axes to reduce, an int or a tuple.
        feature_axis: the axes that carry parameters; None: those of `axis`.
        epsilon: added to the mean square, inside the root.
        scale_offset: added to `scale` in float32, for models that store gamma - 1 (Gemma: 1.0).
        mask: broadcasts to `x`; nonzero elements enter the mean square. All are normalized.
        axis_name: a named axis over which each slice goes on, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x` and scale promote to.
        implementation: None (choose) or "xla"; "two_pass" for the textbook's two passes with a
            rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`. The product with scale is taken before the one rounding to
        `dtype`.

    Raises:
        TypeError: arrays of integers, numbers that are no Python numbers.
        ValueError: as `layer_norm`; also a `scale_offset` without a `scale`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation (4).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> print(jaxnorm.rms_norm(jnp.array([3.0, 4.0]), epsilon=0.0).round(3))
        [0.849 1.131]
    """
    op = "rms_norm"
    x = check.inexact(op, "x", x)
    reduced = check.axes(op, "axis", axis, x)
    features = reduced if feature_axis is None else check.axes(op, "feature_axis", feature_axis, x)
    offset = check.number(op, "scale_offset", scale_offset, float("-inf"), float("inf"), "1.0")
    scale = check.parameter(op, "scale", scale, x, features)
    dtype = check.result_dtype(op, x, scale, dtype=dtype)
    if offset:
        if scale is None:
            raise ValueError(
                f"{op}: scale_offset={offset} is added to scale; got scale=None. Give a scale, or "
                "leave scale_offset at 0."
            )
        scale = layer.offset_scale(scale, offset)
    return _per_slice(
        op, x, scale, None, reduced, features, epsilon, mask, axis_name, axis_index_groups, dtype,
        implementation, centered=False,
    )  # fmt: skip


def instance_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*features"] | None = None,
    bias: Inexact[Array, "*features"] | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Instance normalization: each feature of each example over its spatial axes.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Args:
        x: float16, bfloat16, float32, float64 or complex; axis 0 is the batch.
        scale: gamma, of the feature axes' shape; None for 1.
        bias: beta, likewise; None for 0.
        feature_axis: the axes that carry parameters, never axis 0; all others but 0 are reduced.
        epsilon: added to the variance, inside the root.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All are normalized.
        axis_name: a named axis over which the spatial axes go on, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose) or "xla"; "two_pass" for the textbook's two passes with a
            rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`. Without a spatial axis each slice is one element, and `y` is bias.

    Raises:
        TypeError: as `layer_norm`.
        ValueError: as `layer_norm`; also a feature axis that is axis 0.

    Source: Ulyanov, Vedaldi & Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
    Stylization", 2016, equation (2).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[[1.0, 5.0], [3.0, 9.0]]])  # one example, two places, two features
        >>> jaxnorm.instance_norm(x).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    op = "instance_norm"
    x = check.inexact(op, "x", x)
    features = check.axes(op, "feature_axis", feature_axis, x)
    reduced = tuple(a for a in range(1, x.ndim) if a not in features)
    if 0 in features:
        raise ValueError(
            f"{op}: The channel axes cannot include the leading dimension as this is assumed to be "
            f"the batch axis; got x.shape={x.shape} with "
            f"feature_axis={feature_axis}. Name another axis, or add one: x[None]."
        )
    return _per_slice(
        op, x, scale, bias, reduced, features, epsilon, mask, axis_name, axis_index_groups, dtype,
        implementation,
    )  # fmt: skip


def group_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, " features"] | None = None,
    bias: Inexact[Array, " features"] | None = None,
    *,
    num_groups: int = 32,
    feature_axis: int = -1,
    axis: Axes | None = None,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Group normalization: consecutive features in groups, each over its spatial axes.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Args:
        x: float16, bfloat16, float32, float64 or complex; axis 0 is the batch.
        scale: gamma, one for each feature; None for 1.
        bias: beta, likewise; None for 0.
        num_groups: number of groups, a divisor of the number of features. 1 is layer
            normalization over all but the batch, the number of features is instance normalization.
        feature_axis: the axis that carries parameters and is split into groups.
        axis: the axes to reduce, the feature axis among them; None: all but axis 0.
        epsilon: added to the variance, inside the root.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All are normalized.
        axis_name: a named axis over which the spatial axes go on, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose) or "xla"; "two_pass" for the textbook's two passes with a
            rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`.

    Raises:
        TypeError: as `layer_norm`; also a `num_groups` that is no int.
        ValueError: as `layer_norm`; also a `num_groups` that does not divide the features, or an
            `axis` without the feature axis.

    Source: Wu & He, "Group Normalization", 2018, equations (1), (2) and (7).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
        >>> jaxnorm.group_norm(x, num_groups=2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    op = "group_norm"
    x = check.inexact(op, "x", x)
    features = check.axes(op, "feature_axis", feature_axis, x)
    if axis is None:
        reduced = tuple(sorted({*range(1, x.ndim), *features}))
    else:
        reduced = check.axes(op, "axis", axis, x)
    if len(features) != 1 or features[0] not in reduced:
        raise ValueError(
            f"{op}: there is one feature axis, and it is reduced within each group; got "
            f"feature_axis={feature_axis} and axis={axis} for x.shape={x.shape}. Name one feature "
            "axis, and name it in axis too (or leave axis=None)."
        )
    groups = check.groups_of(op, num_groups, x, features[0])
    scale = check.parameter(op, "scale", scale, x, features)
    bias = check.parameter(op, "bias", bias, x, features)
    reduction, mask, dtype = _prepared(
        op, x, scale, bias, reduced, epsilon, mask, axis_name, axis_index_groups, dtype,
        implementation,
    )  # fmt: skip
    return group.grouped(
        x,
        scale,
        bias,
        num_groups=groups,
        feature_axis=features[0],
        reduction=reduction,
        mask=mask,
        dtype=dtype,
    )


def standardize_weight(
    kernel: Inexact[Array, "*shape"],
    gain: Inexact[Array, "..."] | None = None,
    *,
    axis: Axes | None = None,
    epsilon: float = 1e-5,
) -> Inexact[Array, "*shape"]:
    r"""Weight standardization: zero mean and unit variance for each output of a kernel.

    .. math::
        \hat W = g \frac{W - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Args:
        kernel: floating or complex, e.g. (height, width, in, out).
        gain: g, of the shape of the axes that are not reduced; None for 1. For activations of unit
            variance without another normalization, ``1 / sqrt(fan_in)`` (Brock, De & Smith, 2021).
        axis: the axes to reduce; None: all but the last.
        epsilon: added to the variance, inside the root.

    Returns:
        The standardized kernel, in the dtype of `kernel` and `gain` promoted.

    Raises:
        TypeError: arrays of integers.
        ValueError: a gain of another shape, an axis out of range, no axis to reduce.

    Source: Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019, equations (5) and (6).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> jaxnorm.standardize_weight(jnp.array([[1.0, 0.0], [3.0, 8.0]])).round(3).tolist()
        [[-1.0, -1.0], [1.0, 1.0]]
    """
    op = "standardize_weight"
    kernel = check.inexact(op, "kernel", kernel)
    reduced = check.axes(op, "axis", tuple(range(kernel.ndim - 1)) if axis is None else axis, kernel)
    outputs = tuple(a for a in range(kernel.ndim) if a not in reduced)
    gain = check.parameter(op, "gain", gain, kernel, outputs)
    check.not_empty(op, kernel, reduced)
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-5")
    return layer.per_slice(
        kernel,
        gain,
        None,
        reduction=Reduction(reduced, epsilon),
        feature_axes=outputs,
        mask=None,
        dtype=check.result_dtype(op, kernel, gain),
    )


def _per_slice(
    op, x, scale, bias, reduced, features, epsilon, mask, axis_name, groups, dtype, implementation,
    *, centered=True,
):  # fmt: skip
    scale = check.parameter(op, "scale", scale, x, features)
    bias = check.parameter(op, "bias", bias, x, features)
    reduction, mask, dtype = _prepared(
        op, x, scale, bias, reduced, epsilon, mask, axis_name, groups, dtype, implementation,
        centered=centered,
    )  # fmt: skip
    return layer.per_slice(
        x, scale, bias, reduction=reduction, feature_axes=features, mask=mask, dtype=dtype
    )


def _prepared(
    op, x, scale, bias, reduced, epsilon, mask, axis_name, groups, dtype, implementation,
    *, centered=True,
):  # fmt: skip
    """The checks that all stateless normalizations share."""
    two_pass = check.implementation_of(op, implementation)
    check.not_empty(op, x, reduced)
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-6")
    mask = check.mask_of(op, mask, x)
    replicas = named_axis(op, axis_name, groups)
    dtype = check.result_dtype(op, x, scale, bias, dtype=dtype)
    return Reduction(reduced, epsilon, replicas, centered, two_pass), mask, dtype


def _checked_stats(op: str, stats, x, features) -> BatchStats:
    if not (isinstance(stats, tuple) and len(stats) == len(BatchStats._fields)):
        raise TypeError(
            f"{op}: stats must be jaxnorm.BatchStats(mean, var, count); got "
            f"{type(stats).__name__}. Start from jaxnorm.init_batch_stats(num_features)."
        )
    mean = check.parameter(op, "stats.mean", stats[0], x, features)
    var = check.parameter(op, "stats.var", stats[1], x, features)
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
