"""Layer, RMS and instance normalization: each slice by itself."""

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core import layer
from jaxnorm.core.arguments import Axes
from jaxnorm.distributed.axes import AxisName
from jaxnorm.functional.prepare import prepared

DType = jax.typing.DTypeLike


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
        >>> [round(v, 3) for v in jaxnorm.rms_norm(jnp.array([3.0, 4.0]), epsilon=0.0).tolist()]
        [0.849, 1.131]
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


def _per_slice(
    op, x, scale, bias, reduced, features, epsilon, mask, axis_name, groups, dtype, implementation,
    *, centered=True,
):  # fmt: skip
    scale = check.parameter(op, "scale", scale, x, features)
    bias = check.parameter(op, "bias", bias, x, features)
    reduction, mask, dtype = prepared(
        op, x, scale, bias, reduced, epsilon, mask, axis_name, groups, dtype, implementation,
        centered=centered,
    )  # fmt: skip
    return layer.per_slice(
        x, scale, bias, reduction=reduction, feature_axes=features, mask=mask, dtype=dtype
    )
