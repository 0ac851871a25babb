"""The moments of an array as a pure function."""

from jax.typing import ArrayLike
from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core.arguments import Axes
from jaxnorm.core.measure import Measurement
from jaxnorm.core.moments import Moments
from jaxnorm.core.normalize import measured_moments
from jaxnorm.core.slices import Slices
from jaxnorm.distributed.axes import AxisName, named_axis


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

    Exact at any offset of the data: squares are taken of shifted data.

    Args:
        x: floating or complex numbers, any shape.
        axis: the axes to reduce, an int or a tuple.
        mask: broadcasts to `x`; nonzero elements count. None: all do.
        axis_name: a named axis (or several) along which the slices continue, bound by `vmap`,
            `pmap` or `shard_map`; the moments are those of all its members together, merged by
            count.
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
    slices = Slices(axes, replicas=named_axis(op, axis_name, axis_index_groups))
    check.not_empty(op, x, axes)
    return measured_moments(x, Measurement(slices), mask).as_moments(axes)
