"""Moments of slices, their merging, and the backward pass of both definitions."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxnorm.testing.oracle.slices import (
    Array,
    Axes,
    Precision,
    gather,
    like_primal,
    slices_over,
    squared,
)


class Moments(NamedTuple):
    """Count, mean and second central moment: what `merge` combines.

    Attributes:
        count: the number of included elements.
        mean: their mean; zero where count is zero.
        m2: sum of |x - mean|^2.

    Example:
        >>> Moments(*moments([1.0, 2.0, 6.0], 0)).m2.tolist()
        14.0
    """

    # A tuple has a method `count`, which this field hides.
    count: Array  # float64  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array  # float64 or complex128, shape of count
    m2: Array  # float64, shape of count


def moments(x: ArrayLike, axis: Axes, *, mask: ArrayLike | None = None) -> Moments:
    """Count, mean and m2 = sum of |x - mean|^2 over `axis`, without the reduced axes.

    Args:
        x: real or complex, any shape.
        axis: the axes to reduce.
        mask: broadcastable to x.

    Returns:
        `Moments`, each field in the shape of x without the reduced axes; all zero where the
        mask leaves nothing.

    Raises:
        ValueError: axes or mask do not fit.
        TypeError: x does not hold numbers.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (Stanford, STAN-CS-79-773).

    Example:
        >>> count, mean, m2 = moments([[1.0, 3.0], [5.0, 5.0]], -1)
        >>> count.tolist(), mean.tolist(), m2.tolist()
        ([2.0, 2.0], [2.0, 5.0], [2.0, 0.0])
    """
    precision = Precision.of("moments", x)
    layout = slices_over("moments", np.shape(x), axis, None)
    found = gather(layout, precision.widen(x), mask)
    fields = (found.count, found.mean, found.m2)
    return Moments(*(precision.narrow(np.squeeze(f, axis=layout.axes)) for f in fields))


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of elements together.

    With n = n_a + n_b and d = mean_b - mean_a,

        mean = mean_a + d * n_b / n,     m2 = m2_a + m2_b + |d|^2 * n_a * n_b / n.

    Associative and commutative; moments of count zero change nothing.

    Args:
        a: `Moments`, or any three arrays (count, mean, m2).
        b: the same, in shapes that broadcast.

    Returns:
        `Moments`.

    Raises:
        TypeError: an array does not hold numbers.

    Source: Chan, Golub and LeVeque 1979 (see `moments`).

    Example:
        >>> two, three = moments([0.0, 2.0], 0), moments([1.0, 5.0, 9.0], 0)
        >>> [float(f) for f in merge(two, three)]
        [5.0, 3.4, 53.2]
    """
    precision = Precision.of("merge", *a, *b)
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = (
        [precision.widen(f) for f in part] for part in (a, b)
    )
    count = count_a + count_b
    part_b = count_b / np.maximum(count, 1)
    difference = mean_b - mean_a
    mean = np.where(count_a == 0, mean_b, mean_a + difference * part_b)
    m2 = m2_a + m2_b + squared(difference) * count_a * part_b
    return Moments(*(precision.narrow(np.asarray(f)) for f in (count, mean, m2)))


def moments_vjp(
    dmean: ArrayLike,
    dm2: ArrayLike,
    x: ArrayLike,
    axis: Axes,
    *,
    mask: ArrayLike | None = None,
) -> Array:
    """The cotangent of `x` from those of the mean and of m2 (the count has none).

    With m_j = 1 for an included element and else 0,

        dx_j = m_j * (dmean / n + 2 * dm2 * conj(x_j - mean)),

    in JAX's pairing Re sum(cotangent * tangent); zero where the mask leaves nothing.

    Args:
        dmean: cotangent of the mean, real or complex like it, in its shape.
        dm2: cotangent of m2, real, in its shape.
        x: as in `moments`.
        axis: as in `moments`.
        mask: as in `moments`.

    Returns:
        dx, shape of x; real for real x.

    Raises:
        ValueError: axes, mask or the shape of a cotangent do not fit.
        TypeError: an array does not hold numbers.

    Source: differentiation of the definitions.

    Example:
        >>> moments_vjp(4.0, 1.0, [0.0, 2.0], 0).tolist()
        [0.0, 4.0]
    """
    precision = Precision.of("moments_vjp", dmean, dm2, x)
    wide = precision.widen(x)
    layout = slices_over("moments_vjp", wide.shape, axis, None)
    found = gather(layout, wide, mask)
    kept = np.squeeze(found.count, axis=layout.axes).shape
    cotangents = []
    for name, given in (("dmean", dmean), ("dm2", dm2)):
        if np.shape(given) != kept:
            raise ValueError(
                f"moments_vjp: {name} must have the shape of x.shape={wide.shape} without "
                f"axis={axis}, {kept}; got {np.shape(given)}. Reshape it."
            )
        cotangents.append(precision.widen(given).reshape(found.count.shape))
    dmean, dm2 = cotangents
    dx = dmean / np.maximum(found.count, 1) + 2 * np.real(dm2) * np.conj(found.xhat)
    return precision.narrow(like_primal(np.where(found.included, dx, 0), wide))
