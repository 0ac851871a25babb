"""Group normalization as a pure function."""

from collections.abc import Callable

from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Axes
from jaxnorm.distributed.axes import AxisName
from jaxnorm.functional.prepare import DType, stateless_norm


def group_norm(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    bias: Inexact[Array, "..."] | None = None,
    *,
    num_groups: int = 32,
    feature_axis: int = -1,
    axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    activation: Callable | None = None,
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
        scale: gamma, one for each feature, or of the rank of `x` as in `layer_norm`; None for 1.
        bias: beta, likewise; None for 0.
        num_groups: number of groups, a divisor of the number of features. 1 is layer
            normalization over all but the batch, the number of features is instance normalization.
        feature_axis: the axis that carries parameters and is split into groups.
        axis: the axes to reduce, the feature axis among them; None: all but axis 0.
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
    if axis is None and features == (0,):
        raise ValueError(
            f"{op}: axis 0 is the batch, which is not reduced unless axis says so; got "
            f"feature_axis={feature_axis} for x.shape={x.shape}. Name another one, or axis."
        )
    if len(features) != 1 or features[0] not in reduced:
        raise ValueError(
            f"{op}: there is one feature axis, and it is reduced within each group; got "
            f"feature_axis={feature_axis} and axis={axis} for x.shape={x.shape}. Name one feature "
            "axis, and name it in axis too (or leave axis=None)."
        )
    groups = check.groups_of(op, num_groups, x, features[0])
    return stateless_norm(
        op, x, scale, bias, tuple(a for a in reduced if a not in features), features,
        epsilon=epsilon, scale_offset=scale_offset, activation=activation, mask=mask,
        axis_name=axis_name, axis_index_groups=axis_index_groups, dtype=dtype,
        implementation=implementation, blocks=(features[0], groups),
    )  # fmt: skip
