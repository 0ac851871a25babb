"""The common part of all oracles: working precision, layout of slices, statistics of slices.

A normalization is a layout (which elements form a slice, which axes carry parameters) and two
formulas: `standardize_slices` forward and `standardize_slices_vjp` backward. The families differ
only in the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]
Axes = int | tuple[int, ...]

_WIDE = {np.dtype(t) for t in (np.float64, np.complex128, np.longdouble, np.clongdouble)}
_WIDEST = {np.dtype(t) for t in (np.longdouble, np.clongdouble)}


class Precision(NamedTuple):
    """The real dtypes in which one call computes and returns its results.

    Inputs of at most float32 are computed in float64. If one input is float64, the call computes in
    `numpy.longdouble`. That has 80 bits on x86 Linux; if NumPy has nothing wider than float64, it
    is float64 again. Results are float64, unless an input was longdouble itself, which finite
    differences of the oracle need. Complex arrays take the complex dtype of the same width.
    """

    work: DTypeLike
    result: DTypeLike

    @classmethod
    def of(cls, operation: str, *arrays: ArrayLike | None) -> Precision:
        """The precision for these inputs; `None` stands for an absent one."""
        dtypes = {np.asarray(a).dtype for a in arrays if a is not None}
        for dtype in dtypes:
            if dtype.kind in "OSUMm":
                raise TypeError(
                    f"{operation}: arrays must hold numbers; got dtype {dtype}. Convert it."
                )
        return cls(
            work=np.longdouble if dtypes & _WIDE else np.float64,
            result=np.longdouble if dtypes & _WIDEST else np.float64,
        )

    def widen(self, array: ArrayLike) -> Array:
        """`array` in the working dtype, real or complex as it was."""
        return _as_kind(np.asarray(array), self.work)

    def narrow(self, array: Array) -> Array:
        """`array` in the dtype of the results, real or complex as it was."""
        return _as_kind(array, self.result)


def _as_kind(array: Array, real: DTypeLike) -> Array:
    is_complex = np.issubdtype(array.dtype, np.complexfloating)
    return array.astype(np.result_type(real, np.complex64) if is_complex else real)


def canonical_axes(operation: str, name: str, axis: Axes, ndim: int) -> tuple[int, ...]:
    """`axis` as ascending non-negative axes; `ValueError` if out of range or repeated."""
    given = (axis,) if isinstance(axis, int | np.integer) else tuple(axis)
    if any(not -ndim <= a < ndim for a in given) or len({a % ndim for a in given}) < len(given):
        raise ValueError(
            f"{operation}: {name} must hold distinct axes of an array with {ndim} dimensions; "
            f"got {name}={axis}. Name each axis once, from {-ndim} to {ndim - 1}."
        )
    return tuple(sorted(int(a) % ndim for a in given))


class SliceLayout(NamedTuple):
    """The axes of the slices and the parameters of one normalization.

    `x` is reshaped to `view` and reduced there over `axes`. `scale` and `bias` lie on the axes
    `features` of the original `shape`, their sizes in ascending axis order.
    """

    operation: str
    shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: tuple[int, ...]
    features: tuple[int, ...]

    def expand(self, name: str, parameter: Array) -> Array:
        """`parameter` reshaped so that it broadcasts against `x`."""
        if self._broadcasts(parameter.shape):
            return parameter
        wanted = tuple(self.shape[a] for a in self.features)
        if parameter.shape != wanted:
            raise ValueError(
                f"{self.operation}: {name} must have the shape of the feature axes "
                f"{self.features} of x.shape={self.shape}, {wanted}; got {parameter.shape}. "
                f"Reshape it, or name other feature axes."
            )
        inside = range(len(self.shape))
        return parameter.reshape([self.shape[a] if a in self.features else 1 for a in inside])

    def _broadcasts(self, shape: tuple[int, ...]) -> bool:
        """True if a parameter has the rank of `x`, with 1 or its size on each axis."""
        return len(shape) == len(self.shape) and all(
            m in (1, n) for m, n in zip(shape, self.shape, strict=True)
        )

    def collect(self, array: Array, parameter: Array) -> Array:
        """The sum of `array` over all axes that carry none of it: the transpose of `expand`."""
        if self._broadcasts(parameter.shape):
            repeated = tuple(a for a, n in enumerate(parameter.shape) if n < self.shape[a])
            return array.sum(axis=repeated, keepdims=True)
        others = tuple(a for a in range(len(self.shape)) if a not in self.features)
        return array.sum(axis=others)

    def check_like_x(self, name: str, array: Array) -> None:
        """Raise a ValueError unless `array` has the shape of `x`."""
        if array.shape != self.shape:
            raise ValueError(
                f"{self.operation}: {name} must have the shape of x, {self.shape}; got "
                f"{array.shape}. Broadcast it first."
            )

    def included(self, mask: ArrayLike | None) -> Array:
        """Boolean array of shape `view` that is true for the elements that enter the moments."""
        chosen = np.asarray(True if mask is None else np.asarray(mask) != 0)
        try:
            return np.broadcast_to(chosen, self.shape).reshape(self.view)
        except ValueError:
            raise ValueError(
                f"{self.operation}: mask must broadcast to x.shape={self.shape}; got "
                f"mask.shape={chosen.shape}. Insert axes of size 1 where it is to be repeated."
            ) from None


def slices_over(
    operation: str, shape: tuple[int, ...], axes: Axes, features: Axes | None
) -> SliceLayout:
    """The layout that reduces `axes` of `x` itself; `features=None` means the same axes."""
    reduced = canonical_axes(operation, "axis", axes, len(shape))
    if features is None:
        return SliceLayout(operation, shape, shape, reduced, reduced)
    carried = canonical_axes(operation, "feature_axis", features, len(shape))
    return SliceLayout(operation, shape, shape, reduced, carried)


def slices_but(
    operation: str, shape: tuple[int, ...], kept: tuple[int, ...], features: Axes
) -> SliceLayout:
    """The layout that reduces every axis but those `kept` and the feature axes."""
    carried = canonical_axes(operation, "feature_axis", features, len(shape))
    reduced = tuple(a for a in range(len(shape)) if a not in kept and a not in carried)
    return SliceLayout(operation, shape, shape, reduced, carried)


def slices_of_groups(
    operation: str,
    shape: tuple[int, ...],
    num_groups: int,
    feature_axis: int,
    axis: Axes | None,
) -> SliceLayout:
    """The layout of group normalization: the feature axis split into (groups, channels)."""
    (feature,) = canonical_axes(operation, "feature_axis", feature_axis, len(shape))
    channels = shape[feature]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"{operation}: num_groups must divide the {channels} features of x.shape={shape} at "
            f"feature_axis={feature_axis}; got num_groups={num_groups}. Choose a divisor."
        )
    all_but_batch = tuple(range(1, len(shape)))
    reduced = all_but_batch if axis is None else canonical_axes(operation, "axis", axis, len(shape))
    if feature not in reduced:
        raise ValueError(
            f"{operation}: the reduced axes must include the feature axis {feature} of "
            f"x.shape={shape}; got axis={axis}, which reduces {reduced}. Add it to axis."
        )
    view = (*shape[:feature], num_groups, channels // num_groups, *shape[feature + 1 :])
    inside = tuple(a if a < feature else a + 1 for a in reduced)
    return SliceLayout(operation, shape, view, inside, (feature,))


def weight_layout(operation: str, shape: tuple[int, ...], axis: Axes | None) -> SliceLayout:
    """The layout of weight standardization: the gain lies on the axes that are not reduced."""
    if axis is None:
        return slices_but(operation, shape, (), -1)
    reduced = slices_over(operation, shape, axis, None).axes
    kept = tuple(a for a in range(len(shape)) if a not in reduced)
    return slices_but(operation, shape, (), kept)


def full_gain(layout: SliceLayout, gain: ArrayLike | None) -> Array | None:
    """The gain, broadcast to the axes that are not reduced."""
    if gain is None:
        return None
    given, wanted = np.asarray(gain), tuple(layout.shape[a] for a in layout.features)
    try:
        return np.broadcast_to(given, wanted)
    except ValueError:
        raise ValueError(
            f"{layout.operation}: gain must broadcast to the axes of kernel.shape={layout.shape} "
            f"that are not reduced, {wanted}; got gain.shape={given.shape}. Reshape it."
        ) from None


@dataclass(frozen=True)
class Slices:
    """Statistics of each slice, and its standardized elements.

    Every field but `xhat` and `included` keeps the reduced axes with size 1.
    """

    # Dtypes are the working precision: float64 or longdouble, or complex of the same width.
    included: Array  # bool, shape of the view
    count: Array  # real; the number of included elements
    mean: Array  # real or complex like x; zero if the second moment is not centered
    m2: Array  # real; sum of |x - mean|^2 over the included elements
    rstd: Array  # real; zero marks a slice without elements or without deviation
    xhat: Array  # real or complex like x, shape of the view


def gather(
    layout: SliceLayout, x: Array, mask: ArrayLike | None, *, centered: bool = True
) -> Slices:
    """Moments of each slice; `xhat` holds `x - mean`, and `rstd` holds ones.

    The mean is taken in two steps: a mean, and then the mean of the residuals. So no digit is lost
    if the offset of the data is much larger than its deviation. The two steps also make the
    residuals of a constant slice exactly zero: after the first step they all equal the same few
    last digits of the constant, whose sum and mean are exact.
    """
    values, included = x.reshape(layout.view), layout.included(mask)
    axes, real = layout.axes, np.real(values).dtype

    def total(array: Array) -> Array:
        return np.sum(np.where(included, array, 0), axis=axes, keepdims=True)

    count = np.sum(included, axis=axes, keepdims=True, dtype=real)
    safe = np.maximum(count, 1)
    mean = np.zeros_like(values, shape=count.shape)
    residual = values
    if centered:
        first = divided(total(values), safe)
        residual = values - first
        second = divided(total(residual), safe)
        mean, residual = first + second, residual - second
    m2 = total(squared(residual))
    return Slices(included, count, mean, m2, np.ones_like(m2), residual)


def squared(array: Array) -> Array:
    """|array|^2, without the square root that `abs` of a complex number takes."""
    return np.real(array) ** 2 + np.imag(array) ** 2


def divided(array: Array, count: Array) -> Array:
    """array / count, part by part: NumPy divides complex numbers through a rounded reciprocal."""
    if not np.iscomplexobj(array):
        return array / count
    return np.real(array) / count + 1j * (np.imag(array) / count)


def reciprocal_deviation(operation: str, var: Array, epsilon: float) -> Array:
    """1 / sqrt(var + epsilon), and zero if var + epsilon is zero."""
    if not epsilon >= 0:
        raise ValueError(
            f"{operation}: epsilon must be zero or positive; got epsilon={epsilon}. For example "
            "epsilon=1e-5."
        )
    shifted = var + var.dtype.type(epsilon)
    return np.where(shifted == 0, 0, 1 / np.sqrt(np.where(shifted == 0, 1, shifted)))


def standardize_slices(
    layout: SliceLayout, x: Array, mask: ArrayLike | None, *, epsilon: float, centered: bool = True
) -> Slices:
    """xhat = (x - mean) * rstd for every element, masked out or not.

    rstd = 1 / sqrt(m2 / count + epsilon), and zero (hence xhat = 0) for a slice without an
    element or with var + epsilon = 0.
    """
    found = gather(layout, x, mask, centered=centered)
    var = found.m2 / np.maximum(found.count, 1)
    rstd = np.where(found.count > 0, reciprocal_deviation(layout.operation, var, epsilon), 0)
    return replace(found, rstd=rstd, xhat=scaled(found.xhat, rstd))


def scaled(residual: Array, rstd: Array) -> Array:
    """residual * rstd, and zero where rstd is zero, even if the residual is not finite."""
    out = np.zeros_like(residual)
    return np.multiply(residual, rstd, out=out, where=rstd != 0)


def standardize_slices_vjp(
    layout: SliceLayout, g: Array, found: Slices, *, centered: bool = True
) -> Array:
    """The cotangent of `x`, from `g`, the cotangent of `xhat` (shape of `x`).

    With n included elements, m_j = 1 for an included element and else 0,

        dx_j = rstd * (g_j - m_j/n * sum(g) - m_j/n * conj(xhat_j) * Re sum(g * xhat)),

    both sums over the whole slice, masked-out positions too, since those are normalized with
    the slice's moments. Without centering the term sum(g) is absent. It follows from

        xhat_i = rstd * (x_i - mean),     dvar = 2/n * sum_j m_j Re(conj(x_j - mean) dx_j),

    (the mean's own change drops out of dvar, as the included residuals sum to zero) and from
    the pairing Re sum(cotangent * tangent), which is JAX's: no conjugate.
    """
    g = g.reshape(layout.view)
    share = found.included / np.maximum(found.count, 1)
    along = np.sum(np.real(g * found.xhat), axis=layout.axes, keepdims=True)
    dx = g - share * np.conj(found.xhat) * along
    if centered:
        dx = dx - share * np.sum(g, axis=layout.axes, keepdims=True)
    return np.where(found.rstd == 0, 0, found.rstd * dx).reshape(layout.shape)


def like_primal(cotangent: Array, primal: Array) -> Array:
    """The real part where the primal is real: JAX's cotangent of a real input is real."""
    return cotangent if np.iscomplexobj(primal) else np.real(cotangent)


def batch_weight(decay: float | None, count: int, debias: bool) -> np.longdouble:
    """The weight of the batch in the next running value; see `jaxnorm.testing.oracle.batch_norm`.

    With `debias`, decay = 1 takes the limit 1 / t, with t = count + 1.
    """
    updates = np.longdouble(count + 1)
    if decay is None:
        return 1 / updates
    if not 0 <= decay <= 1:
        raise ValueError(
            f"batch_norm: decay must lie in [0, 1] or be None; got decay={decay}. For example "
            "decay=0.9."
        )
    kept = np.longdouble(decay)
    if not debias:
        return 1 - kept
    return 1 / updates if decay == 1 else (1 - kept) / (1 - kept**updates)
