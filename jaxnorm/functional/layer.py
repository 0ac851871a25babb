"""Layer, RMS and instance normalization: each slice by itself."""

from collections.abc import Callable

from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Axes, Save
from jaxnorm.distributed.axes import AxisName
from jaxnorm.functional.prepare import DType, stateless_norm, trailing_norm


def layer_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    bias: Inexact[Array, "..."] | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    activation: Callable | None = None,
    save: Save = "input",
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups=None,
    dtype: DType | None = None,
    implementation: str | None = None,
) -> Inexact[Array, "*shape"]:
    r"""Layer normalization: each slice over `axis` by itself.

    .. math::
        y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the mean and biased variance of each slice over `axis`.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape.
        scale: gamma, of the shape of the feature axes in ascending order; or of the rank of `x`
            and 1 or its size on every axis: (N, 1, C), one for each sample. None for 1.
        bias: beta, likewise; None for 0.
        axis: the axes to reduce, an int or a tuple.
        feature_axis: the axes that carry parameters; None: those of `axis`.
        epsilon: added to the variance, inside the root.
        scale_offset: added to `scale` in float32, for models that store gamma - 1.
        activation: an elementwise function, applied before the one rounding to `dtype`; what it is
            applied to is recomputed in the backward pass, not kept.
        save: which array the backward pass keeps beside a number for each slice: "input" (`x`), or
            "output", `y`, for a next operation that keeps it anyway; see below.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All are normalized.
        axis_name: a named axis along which each slice continues, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose, see `jaxnorm.explain`); "xla" or "pallas" to require one, on
            GPUs a kernel that awaits a measurement; "two_pass" for the textbook's two passes with
            a rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    With ``save="output"`` the backward pass recomputes ``xhat = (y - bias) / scale``, whose error
    grows as the rounding of `y`: by ``eps / 2 * |y / scale|``, with eps = 2^-7 for bfloat16. Use it
    where scale stays away from zero. Where it is exactly zero the derivatives with respect to
    those elements of `x` and of scale cannot be recovered, and are NaN (in forward mode the whole
    slice's); a `scale_offset` of 1 keeps a scale that starts at zero clear of that. It saves
    memory where layers are scanned, or forward and backward pass compiled apart; a compiler that
    sees both may recompute the output from the input by itself.

    Returns:
        `y` of the shape of `x`. A slice of equal elements, or without elements, gives exactly
        `bias`, or `activation(bias)`.

    Raises:
        TypeError: arrays of integers, numbers that are no Python numbers.
        ValueError: parameters not of the feature axes' shape, an axis out of range or named
            twice, an empty slice, a mask that does not broadcast, a negative `epsilon`, an
            `axis_name` that is not bound, a `scale_offset` without a `scale`, an `activation` that
            does not keep the shape, ``save="output"`` with an `activation` or an `axis_name`,
            ``implementation="pallas"`` where there is no kernel for the call.

    Source: Ba, Kiros & Hinton, "Layer Normalization", 2016, equation (4). Peebles & Xie, "Scalable
    Diffusion Models with Transformers", 2023, section 3.2, for scale and bias of each sample. Rota
    Bulo, Porzi & Kontschieder, "In-Place Activated BatchNorm", 2018, section 3, for `save`.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> print(jaxnorm.layer_norm(jnp.array([1.0, 2.0, 3.0]), epsilon=0.0).round(3))
        [-1.225  0.     1.225]
    """
    return trailing_norm(
        "layer_norm", x, scale, bias, axis=axis, feature_axis=feature_axis, epsilon=epsilon,
        scale_offset=scale_offset, activation=activation, save=save, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip


def rms_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    activation: Callable | None = None,
    save: Save = "input",
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
        scale: gamma, of the shape of the feature axes in ascending order; or of the rank of `x`
            and 1 or its size on every axis: (N, 1, C), one for each sample. None for 1.
        axis: the axes to reduce, an int or a tuple.
        feature_axis: the axes that carry parameters; None: those of `axis`.
        epsilon: added to the mean square, inside the root.
        scale_offset: added to `scale` in float32, for models that store gamma - 1 (Gemma).
        activation: an elementwise function, applied before the one rounding to `dtype`; what it is
            applied to is recomputed in the backward pass, not kept.
        save: which array the backward pass keeps beside a number for each slice: "input" (`x`), or
            "output", `y`, for a next operation that keeps it anyway; see `layer_norm`.
        mask: broadcasts to `x`; nonzero elements enter the mean square. All are normalized.
        axis_name: a named axis along which each slice continues, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x` and scale promote to.
        implementation: None (choose, see `jaxnorm.explain`); "xla" or "pallas" to require one, on
            GPUs a kernel that awaits a measurement; "two_pass" for the textbook's two passes with
            a rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

    Returns:
        `y` of the shape of `x`. The product with scale is taken before the one rounding to
        `dtype`.

    Raises:
        TypeError: arrays of integers, numbers that are no Python numbers.
        ValueError: as `layer_norm`.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation (4).

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> [round(v, 3) for v in jaxnorm.rms_norm(jnp.array([3.0, 4.0]), epsilon=0.0).tolist()]
        [0.849, 1.131]
    """
    return trailing_norm(
        "rms_norm", x, scale, None, axis=axis, feature_axis=feature_axis, epsilon=epsilon,
        scale_offset=scale_offset, activation=activation, save=save, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
        implementation=implementation, centered=False,
    )  # fmt: skip


def instance_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    bias: Inexact[Array, "..."] | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    activation: Callable | None = None,
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
        scale: gamma, of the feature axes' shape, or of the rank of `x` as in `layer_norm`.
        bias: beta, likewise; None for 0.
        feature_axis: the axes that carry parameters, never axis 0; all others but 0 are reduced.
        epsilon: added to the variance, inside the root.
        scale_offset: added to `scale` in float32, for models that store gamma - 1.
        activation: an elementwise function, applied before the one rounding to `dtype`; what it is
            applied to is recomputed in the backward pass, not kept.
        mask: broadcasts to `x`; nonzero elements enter the statistics. All are normalized.
        axis_name: a named axis along which the spatial axes continue, see `batch_norm`.
        axis_index_groups: groups of that axis's indices.
        dtype: dtype of `y`; None: what `x`, scale and bias promote to.
        implementation: None (choose, see `jaxnorm.explain`); "xla" or "pallas" to require one, on
            GPUs a kernel that awaits a measurement; "two_pass" for the textbook's two passes with
            a rounded mean, to reproduce numbers of Flax's use_fast_variance=False.

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
    return stateless_norm(
        op, x, scale, bias, reduced, features, epsilon=epsilon, scale_offset=scale_offset,
        activation=activation, mask=mask, axis_name=axis_name,
        axis_index_groups=axis_index_groups, dtype=dtype, implementation=implementation,
    )  # fmt: skip
