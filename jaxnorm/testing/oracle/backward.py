"""Backward passes of every normalization, derived by hand.

Let g = dy * scale be the cotangent of xhat. Every family's dx is `standardize_slices_vjp` of its
layout,

    dx_j = rstd * (g_j - m_j/n * sum(g) - m_j/n * conj(xhat_j) * Re sum(g * xhat)),

and the cotangents of the parameters are sums over the axes that carry no parameters:

    dscale = sum(dy * xhat),    dbias = sum(dy).

All are checked against finite differences, JAX and PyTorch in `tests/testing/test_oracle.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from jaxnorm.testing.oracle.slices import (
    Array,
    Axes,
    Precision,
    SliceLayout,
    full_gain,
    like_primal,
    reciprocal_deviation,
    scaled,
    slices_but,
    slices_of_groups,
    slices_over,
    standardize_slices,
    standardize_slices_vjp,
    weight_layout,
)

Cotangents = tuple[Array, Array | None, Array | None]


def batch_norm_vjp(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mean: ArrayLike,
    var: ArrayLike,
    *,
    training: bool,
    feature_axis: Axes = -1,
    decay: float | None = 0.99,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    unbiased: bool = False,
    count: int = 0,
    debias: bool = False,
) -> Cotangents:
    """Cotangents of `batch_norm`: (dx, dscale, dbias). Running statistics carry none.

    In training this is the formula of the module, with slices over all axes but the feature axes.
    In evaluation dx = dy * scale / sqrt(var + epsilon). Arguments that only shape the running
    statistics (decay, unbiased, count, debias) are accepted and change nothing.

    Args:
        dy: cotangent of y, shape of x.
        x, scale, bias, mean, var, training, feature_axis, epsilon, mask: as in `batch_norm`.
        decay, unbiased, count, debias: as in `batch_norm`; not used.

    Returns:
        (dx, dscale, dbias), `None` for a parameter that is `None`.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), section 3.

    Example:
        >>> x, dy = [[0.0], [2.0]], [[1.0], [0.0]]
        >>> dx, dscale, dbias = batch_norm_vjp(dy, x, [3.0], None, [0.0], [4.0], training=False)
        >>> dx.round(3).tolist(), dscale.tolist(), dbias
        ([[1.5], [0.0]], [0.0], None)
    """
    del decay, unbiased, count, debias
    precision = Precision.of("batch_norm_vjp", dy, x, scale, bias, mean, var)
    wide = precision.widen(x)
    layout = slices_but("batch_norm_vjp", wide.shape, (), feature_axis)
    if training:
        return _backward(layout, precision, dy, x, scale, bias, epsilon=epsilon, mask=mask)
    old_mean, old_var = (
        layout.expand(name, precision.widen(a)) for name, a in (("mean", mean), ("var", var))
    )
    rstd = reciprocal_deviation("batch_norm_vjp", old_var, epsilon)
    g, dscale, dbias = _affine_vjp(
        layout, precision, dy, scaled(wide - old_mean, rstd), scale, bias
    )
    return precision.narrow(like_primal(g * rstd, wide)), dscale, dbias


def layer_norm_vjp(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Cotangents:
    """Cotangents of `layer_norm`: (dx, dscale, dbias), by the formula of the module.

    Args:
        dy: cotangent of y, shape of x.
        x, scale, bias, axis, feature_axis, epsilon, scale_offset, mask: as in `layer_norm`.

    Returns:
        (dx, dscale, dbias), `None` for a parameter that is `None`.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ba, Kiros and Hinton 2016 (arXiv:1607.06450), section 3, differentiated.

    Example:
        >>> dx, _, _ = layer_norm_vjp([1.0, 0.0, 0.0], [0.0, 3.0, 6.0])
        >>> dx.round(4).tolist()
        [0.068, -0.1361, 0.068]
    """
    layout = slices_over("layer_norm_vjp", np.shape(x), axis, feature_axis)
    precision = Precision.of(layout.operation, dy, x, scale, bias)
    return _backward(
        layout, precision, dy, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset
    )


def rms_norm_vjp(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> tuple[Array, Array | None]:
    """Cotangents of `rms_norm`: (dx, dscale).

    dx_j = rstd * (g_j - m_j/n * conj(xhat_j) * Re sum(g * xhat)), g = dy * (scale_offset + scale).

    Args:
        dy: cotangent of y, shape of x.
        x, scale, axis, feature_axis, epsilon, scale_offset, mask: as in `rms_norm`.

    Returns:
        (dx, dscale), `None` for a scale that is `None`.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), section 4.2.

    Example:
        >>> dx, _ = rms_norm_vjp([1.0, 0.0], [3.0, 4.0])
        >>> dx.round(4).tolist()
        [0.181, -0.1358]
    """
    layout = slices_over("rms_norm_vjp", np.shape(x), axis, feature_axis)
    precision = Precision.of(layout.operation, dy, x, scale)
    dx, dscale, _ = _backward(
        layout,
        precision,
        dy,
        x,
        scale,
        None,
        epsilon=epsilon,
        mask=mask,
        centered=False,
        offset=scale_offset,
    )
    return dx, dscale


def group_norm_vjp(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int = 32,
    feature_axis: int = -1,
    axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Cotangents:
    """Cotangents of `group_norm`: (dx, dscale, dbias), by the formula of the module.

    Args:
        dy: cotangent of y, shape of x.
        x, scale, bias, num_groups, feature_axis, axis: as in `group_norm`.
        epsilon, scale_offset, mask: as in `group_norm`.

    Returns:
        (dx, dscale, dbias), `None` for a parameter that is `None`.

    Raises:
        ValueError: shapes, axes, groups or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Wu and He 2018 (arXiv:1803.08494), section 3.1, differentiated.

    Example:
        >>> _, dscale, _ = group_norm_vjp([[1.0, 1.0, 1.0, 1.0]], [[1.0, 3.0, 10.0, 30.0]],
        ...                               [1.0, 1.0, 1.0, 1.0], num_groups=2)
        >>> dscale.round(3).tolist()
        [-1.0, 1.0, -1.0, 1.0]
    """
    layout = slices_of_groups("group_norm_vjp", np.shape(x), num_groups, feature_axis, axis)
    precision = Precision.of(layout.operation, dy, x, scale, bias)
    return _backward(
        layout, precision, dy, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset
    )


def instance_norm_vjp(
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Cotangents:
    """Cotangents of `instance_norm`: (dx, dscale, dbias), by the formula of the module.

    Args:
        dy: cotangent of y, shape of x.
        x, scale, bias, feature_axis, epsilon, scale_offset, mask: as in `instance_norm`.

    Returns:
        (dx, dscale, dbias), `None` for a parameter that is `None`.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ulyanov, Vedaldi and Lempitsky 2016 (arXiv:1607.08022), section 2, differentiated.

    Example:
        >>> _, _, dbias = instance_norm_vjp([[[1.0], [2.0]]], [[[1.0], [3.0]]], [1.0], [0.0])
        >>> dbias.tolist()
        [3.0]
    """
    layout = slices_but("instance_norm_vjp", np.shape(x), (0,), feature_axis)
    precision = Precision.of(layout.operation, dy, x, scale, bias)
    return _backward(
        layout, precision, dy, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset
    )


def standardize_weight_vjp(
    dw: ArrayLike,
    kernel: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    axis: Axes | None = None,
    epsilon: float = 1e-5,
) -> tuple[Array, Array | None]:
    """Cotangents of `standardize_weight`: (dkernel, dgain), by the formula of the module.

    Args:
        dw: cotangent of w, shape of kernel.
        kernel, gain, axis, epsilon: as in `standardize_weight`.

    Returns:
        (dkernel, dgain); dgain has the shape of gain, `None` for a gain that is `None`.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Qiao et al. 2019 (arXiv:1903.10520), section "Weight Standardization".

    Example:
        >>> _, dgain = standardize_weight_vjp([[1.0], [2.0]], [[1.0], [3.0]], 2.0, epsilon=0.0)
        >>> float(dgain)
        1.0
    """
    layout = weight_layout("standardize_weight_vjp", np.shape(kernel), axis)
    precision = Precision.of(layout.operation, dw, kernel, gain)
    full = full_gain(layout, gain)
    dkernel, dfull, _ = _backward(
        layout, precision, dw, kernel, full, None, epsilon=epsilon, mask=None
    )
    if dfull is None or gain is None:
        return dkernel, None
    shape = np.shape(gain)
    added = dfull.ndim - len(shape)
    repeated = tuple(
        a for a in range(dfull.ndim) if a < added or shape[a - added] != dfull.shape[a]
    )
    return dkernel, dfull.sum(axis=repeated).reshape(shape)


def _backward(
    layout: SliceLayout,
    precision: Precision,
    dy: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    epsilon: float,
    mask: ArrayLike | None,
    centered: bool = True,
    offset: float = 0.0,
) -> Cotangents:
    wide = precision.widen(x)
    found = standardize_slices(layout, wide, mask, epsilon=epsilon, centered=centered)
    xhat = found.xhat.reshape(layout.shape)
    g, dscale, dbias = _affine_vjp(layout, precision, dy, xhat, scale, bias, offset)
    dx = standardize_slices_vjp(layout, g, found, centered=centered)
    return precision.narrow(like_primal(dx, wide)), dscale, dbias


def _affine_vjp(
    layout: SliceLayout,
    precision: Precision,
    dy: ArrayLike,
    xhat: Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    offset: float = 0.0,
) -> Cotangents:
    """(g, dscale, dbias) of y = xhat * (offset + scale) + bias; g is not yet narrowed."""
    g = precision.widen(dy)
    layout.check_like_x("the cotangent", g)
    dscale = dbias = None
    if bias is not None:
        given = precision.widen(bias)
        layout.expand("bias", given)
        dbias = precision.narrow(like_primal(layout.collect(g, given), given))
    if scale is not None:
        given = precision.widen(scale)
        dscale = precision.narrow(like_primal(layout.collect(g * xhat, given), given))
        g = g * (offset + layout.expand("scale", given))
    return g, dscale, dbias
