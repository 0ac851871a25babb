"""Forward passes: every normalization as a layout of slices and one affine step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxnorm.testing.oracle.slices import (
    Array,
    Axes,
    Precision,
    SliceLayout,
    batch_weight,
    full_gain,
    reciprocal_deviation,
    scaled,
    slices_but,
    slices_of_groups,
    slices_over,
    standardize_slices,
    weight_layout,
)


class RunningStats(NamedTuple):
    """Running statistics of one batch-normalized layer.

    Attributes:
        mean: running mean, sizes of the feature axes.
        var: running variance, sizes of the feature axes; divides by n, or by n - 1 if `unbiased`.
        count: updates so far.

    Example:
        >>> stats = RunningStats(np.zeros(2), np.ones(2), 0)
        >>> _, stats = batch_norm(np.ones((3, 2)), None, None, *stats[:2], training=True, decay=0.5)
        >>> stats.mean.tolist(), stats.var.tolist(), stats.count
        ([0.5, 0.5], [0.5, 0.5], 1)
    """

    mean: Array  # float64 or complex128, sizes of the feature axes
    var: Array  # float64, sizes of the feature axes
    # A tuple has a method `count`, which this field hides.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]


def batch_norm(
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
) -> tuple[Array, RunningStats]:
    """Batch normalization in NumPy, and the running statistics after it.

    y = (x - mu) / sqrt(var + epsilon) * scale + bias. In training, mu and var are the moments of
    the batch over all axes but the feature axes, and var divides by n. With the weight w of the
    batch

        new = (1 - w) * old + w * batch,

    where w = 1 - decay. With decay=None, w = 1 / (count + 1), which gives the average of all
    batches. With debias, w = (1 - decay) / (1 - decay^(count + 1)), which equals Adam's
    bias-corrected average started from zero, whatever the initial values. In evaluation, mu and var
    are the running values. These do not change, and the mask is not used.

    Args:
        x: real or complex, any shape.
        scale: sizes of the feature axes, or None.
        bias: sizes of the feature axes, or None.
        mean: running mean, sizes of the feature axes.
        var: running variance, real, sizes of the feature axes.
        training: whether to normalize with the batch and to update.
        feature_axis: the axes that carry the parameters.
        decay: weight of the old running value, in [0, 1], or None.
        epsilon: added to the variance; zero or positive.
        mask: broadcastable to x. A feature whose elements are all masked out keeps its running
            values.
        unbiased: divide the variance that is stored (not the one that normalizes) by n - 1.
        count: updates so far. It grows by one unless no feature had any element.
        debias: see above; decay=None needs none and ignores it.

    Returns:
        `(y, RunningStats)`; y has the shape of x.

    Raises:
        ValueError: shapes, axes, decay or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1; the corrected weight follows
    Kingma and Ba 2014 (arXiv:1412.6980), section 3.

    Example:
        >>> x = [[0.0], [2.0]]
        >>> y, stats = batch_norm(x, None, None, [0.0], [1.0], training=True, decay=0.5)
        >>> y.round(3).tolist(), stats.mean.tolist(), stats.var.tolist(), stats.count
        ([[-1.0], [1.0]], [0.5], [1.0], 1)
    """
    precision = Precision.of("batch_norm", x, scale, bias, mean, var)
    wide, old_mean, old_var = (precision.widen(a) for a in (x, mean, var))
    layout = slices_but("batch_norm", wide.shape, (), feature_axis)
    if not training:
        residual = wide - layout.expand("mean", old_mean)
        rstd = reciprocal_deviation("batch_norm", layout.expand("var", old_var), epsilon)
        y = _affine(layout, precision, scaled(residual, rstd), scale, bias)
        return y, RunningStats(precision.narrow(old_mean), precision.narrow(old_var), count)
    found = standardize_slices(layout, wide, mask, epsilon=epsilon)
    y = _affine(layout, precision, found.xhat, scale, bias)
    divisor = np.maximum(found.count - unbiased, 1)
    weight = batch_weight(decay, count, debias).astype(precision.work)

    def updated(name: str, old: Array, batch: Array) -> Array:
        kept = layout.expand(name, old)
        new = np.where(found.count > 0, (1 - weight) * kept + weight * batch, kept)
        return precision.narrow(new.reshape(old.shape))

    return y, RunningStats(
        updated("mean", old_mean, found.mean),
        updated("var", old_var, found.m2 / divisor),
        count + bool(np.any(found.count > 0)),
    )


def layer_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Array:
    """Layer normalization: y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias.

    Args:
        x: real or complex, any shape.
        scale: sizes of the feature axes, or of the rank of x and broadcastable to it, or None.
        bias: as scale.
        axis: the axes over which the moments are measured.
        feature_axis: the axes that carry the parameters; None: those of `axis`.
        epsilon: added to the variance; zero or positive.
        scale_offset: added to scale; 1 for parameters that are stored around zero.
        mask: broadcastable to x.

    Returns:
        y, shape of x.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ba, Kiros and Hinton 2016 (arXiv:1607.06450), section 3.

    Example:
        >>> layer_norm([[1.0, 3.0], [5.0, 5.0]], [2.0, 2.0], [1.0, 1.0]).round(3).tolist()
        [[-1.0, 3.0], [1.0, 1.0]]
    """
    layout = slices_over("layer_norm", np.shape(x), axis, feature_axis)
    return _normalize(layout, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset)


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    axis: Axes = -1,
    feature_axis: Axes | None = None,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Array:
    """RMS normalization: y = x / sqrt(mean(|x|^2) + epsilon) * (scale_offset + scale).

    Args:
        x: real or complex, any shape.
        scale: as in `layer_norm`; with None there is no factor, whatever the offset.
        axis: the axes over which the mean square is measured.
        feature_axis: the axes that carry the parameters; None: those of `axis`.
        epsilon: added to the mean square; zero or positive.
        scale_offset: added to scale; 1 for parameters that are stored around zero.
        mask: broadcastable to x.

    Returns:
        y, shape of x.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Zhang and Sennrich 2019 (arXiv:1910.07467), section 4.

    Example:
        >>> rms_norm([[3.0, 4.0]], [0.0, 1.0], epsilon=0.0, scale_offset=1.0).round(3).tolist()
        [[0.849, 2.263]]
    """
    layout = slices_over("rms_norm", np.shape(x), axis, feature_axis)
    return _normalize(
        layout, x, scale, None, epsilon=epsilon, mask=mask, centered=False, offset=scale_offset
    )


def group_norm(
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
) -> Array:
    """Group normalization: y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias.

    The feature axis is split into `num_groups` runs of consecutive channels; a slice is one run
    together with the other reduced axes.

    Args:
        x: real or complex, (N, ..., C) with the feature axis anywhere.
        scale: (C,), or of the rank of x and broadcastable to it, or None.
        bias: as scale.
        num_groups: a divisor of C.
        feature_axis: the one axis that carries the parameters and is split.
        axis: the reduced axes, which must include the feature axis; None: all but axis 0.
        epsilon: added to the variance; zero or positive.
        scale_offset: added to scale; 1 for parameters that are stored around zero.
        mask: broadcastable to x.

    Returns:
        y, shape of x.

    Raises:
        ValueError: shapes, axes, groups or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Wu and He 2018 (arXiv:1803.08494), section 3.1.

    Example:
        >>> group_norm([[1.0, 3.0, 10.0, 30.0]], num_groups=2).round(3).tolist()
        [[-1.0, 1.0, -1.0, 1.0]]
    """
    layout = slices_of_groups("group_norm", np.shape(x), num_groups, feature_axis, axis)
    return _normalize(layout, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset)


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axis: Axes = -1,
    epsilon: float = 1e-6,
    scale_offset: float = 0.0,
    mask: ArrayLike | None = None,
) -> Array:
    """Instance normalization: y = (x - mean) / sqrt(var + epsilon) * (scale_offset + scale) + bias.

    The moments are measured over all axes but axis 0 and the feature axes.

    Args:
        x: real or complex, (N, ..., C) with the feature axes anywhere.
        scale: sizes of the feature axes, or of the rank of x and broadcastable to it, or None.
        bias: as scale.
        feature_axis: the axes that carry the parameters.
        epsilon: added to the variance; zero or positive.
        scale_offset: added to scale; 1 for parameters that are stored around zero.
        mask: broadcastable to x.

    Returns:
        y, shape of x.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Ulyanov, Vedaldi and Lempitsky 2016 (arXiv:1607.08022), section 2.

    Example:
        >>> instance_norm([[[1.0, 10.0], [3.0, 30.0]]]).round(3).tolist()
        [[[-1.0, -1.0], [1.0, 1.0]]]
    """
    layout = slices_but("instance_norm", np.shape(x), (0,), feature_axis)
    return _normalize(layout, x, scale, bias, epsilon=epsilon, mask=mask, offset=scale_offset)


def standardize_weight(
    kernel: ArrayLike,
    gain: ArrayLike | None = None,
    *,
    axis: Axes | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """Weight standardization: w = (kernel - mean) / sqrt(var + epsilon) * gain.

    Args:
        kernel: real or complex, any shape.
        gain: broadcastable to the sizes of the axes that are not reduced, or None.
        axis: the axes over which the moments are measured; None: all but the last.
        epsilon: added to the variance; zero or positive.

    Returns:
        w, shape of kernel.

    Raises:
        ValueError: shapes, axes or epsilon do not fit.
        TypeError: an array does not hold numbers.

    Source: Qiao et al. 2019 (arXiv:1903.10520), section "Weight Standardization"; with a gain,
    Brock, De and Smith 2021 (arXiv:2101.08692), "Scaled Weight Standardization".

    Example:
        >>> standardize_weight([[1.0, 10.0], [3.0, 30.0]], [1.0, 2.0]).round(3).tolist()
        [[-1.0, -2.0], [1.0, 2.0]]
    """
    layout = weight_layout("standardize_weight", np.shape(kernel), axis)
    return _normalize(layout, kernel, full_gain(layout, gain), None, epsilon=epsilon, mask=None)


def _normalize(
    layout: SliceLayout,
    x: ArrayLike,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    *,
    epsilon: float,
    mask: ArrayLike | None,
    centered: bool = True,
    offset: float = 0.0,
) -> Array:
    precision = Precision.of(layout.operation, x, scale, bias)
    found = standardize_slices(layout, precision.widen(x), mask, epsilon=epsilon, centered=centered)
    return _affine(layout, precision, found.xhat, scale, bias, offset)


def _affine(
    layout: SliceLayout,
    precision: Precision,
    xhat: Array,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    offset: float = 0.0,
) -> Array:
    y = xhat.reshape(layout.shape)
    if scale is not None:
        y = y * (offset + layout.expand("scale", precision.widen(scale)))
    if bias is not None:
        y = y + layout.expand("bias", precision.widen(bias))
    return precision.narrow(y)
