"""Weight standardization as a pure function."""

from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core import layer
from jaxnorm.core.arguments import Axes
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.slices import Slices


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
    if axis is None and kernel.ndim < 2:
        raise ValueError(
            f"{op}: a kernel has axes of inputs before the last, its outputs; got "
            f"kernel.shape={kernel.shape}. Name the axes to reduce: axis=0, for example."
        )
    reduced = check.axes(
        op, "axis", tuple(range(kernel.ndim - 1)) if axis is None else axis, kernel
    )
    outputs = tuple(a for a in range(kernel.ndim) if a not in reduced)
    if gain is not None:
        advice = "One for each output: the axes that are not reduced; axis names those that are."
        gain = check.statistic(op, "gain", gain, kernel, outputs, advice)
    check.not_empty(op, kernel, reduced)
    epsilon = check.number(op, "epsilon", epsilon, 0.0, float("inf"), "1e-5")
    return layer.normalize_slices(
        kernel,
        gain,
        None,
        measurement=Measurement(Slices(reduced), epsilon),
        feature_axes=outputs,
        mask=None,
        epilogue=Epilogue(check.result_dtype(op, kernel, gain)),
    )
