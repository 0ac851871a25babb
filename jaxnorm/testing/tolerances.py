"""Tolerances, derived from dtypes and conditioning in this one place.

A tolerance here is derived and never tuned. It follows from the dtype of a result, the dtype of its
accumulation (float32 at least), and the conditioning of the computation. An error is measured in
units of rounding,

    unit_i = eps(dtype) * max(floor, |desired_i|)              for values,
    unit   = eps(dtype) * max(floor, max_j |desired_j|)        for derivatives,

where eps is the spacing of the dtype at one, and floor is 1 unless a test sets it. A result may err
by

    budget * conditioning * eps(accumulated) / eps(dtype)  +  1/2 if dtype is narrower

units. The budget is 32 for values and 64 for derivatives. So float32 and float64 may err by that
many of their own units. float16 and bfloat16 are accumulated in float32 and rounded once, by half a
unit. A result that was rounded twice to bfloat16 (for example by a cast before the scale) does not
pass, nor does one that was summed in bfloat16. If two roundings are right, pass `roundings=2`.

32 units are enough for a value, for this reason. Statistics come from shifted data, d = x - s with
s within some deviations of the mean. The subtraction is exact or errs by eps/2 of d. After it every
quantity is of the order of the deviation, whatever the offset of x: the mean of d errs by a few
eps * deviation, var relatively by a few eps, and (d - mean(d)) * rstd by a few eps of
max(1, |xhat|). The offset appears nowhere, so no conditioning appears either. (Without a shift the
error is eps * |offset| / deviation. The budget exists to find that failure.) For sums of more than
1024 terms pass `conditioning=sum_conditioning(n)`. Large parameters scale the error as they scale
xhat: pass `conditioning=max(1, max|scale|)` if scale * xhat + bias may cancel.

A derivative needs more, as `condition_number` explains.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

What = Literal["value", "derivative"]
Axes = int | tuple[int, ...]

BUDGETS: dict[What, float] = {"value": 32.0, "derivative": 64.0}
"""Allowed error of a result at conditioning 1, in units of rounding of the accumulating dtype."""

TERMS_IN_BUDGET = 1024
"""Largest number of terms whose rounding the budget covers; see `sum_conditioning`."""


def _eps(dtype: DTypeLike) -> float:
    given = np.dtype(dtype)
    try:
        return float(ml_dtypes.finfo(_real(given)).eps)
    except ValueError:
        raise TypeError(
            f"tolerance: dtype must be a floating or complex one; got {given}. Integers and "
            f"booleans have no rounding: compare them exactly."
        ) from None


def _real(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of the parts of a complex dtype; another dtype as it is."""
    return np.real(np.zeros((), dtype)).dtype


def tolerance(
    dtype: DTypeLike,
    *,
    what: What = "value",
    conditioning: float = 1.0,
    floor: float = 1.0,
    roundings: int = 1,
) -> float:
    """The absolute error allowed in a result of magnitude `floor` or less.

    floor * (budget * conditioning * eps(accumulated) + roundings * eps(dtype) / 2), the second
    term only where dtype is narrower than float32, as derived in the module's docstring. For a
    result of magnitude m > floor, pass `floor=m`.

    Args:
        dtype: the dtype of the result: floating, or complex (judged by its parts).
        what: "value" (budget 32) or "derivative" (budget 64).
        conditioning: the factor by which the problem magnifies rounding; at least 1.
        floor: the magnitude relative to which rounding counts.
        roundings: the number of roundings to a dtype narrower than float32. It is more than 1 if
            the result passes through several operations that each return that dtype.

    Returns:
        A Python float.

    Raises:
        TypeError: dtype is not floating or complex.
        ValueError: unknown `what`, or a conditioning below 1 or NaN.

    Source: Higham 2002, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3 (the
    model of rounding); the budgets are this library's own.

    Example:
        >>> tolerance("float32") == 32 * 2.0**-23
        True
        >>> tolerance("bfloat16") == 2.0**-8 + 32 * 2.0**-23
        True
    """
    if what not in BUDGETS:
        raise ValueError(
            f"tolerance: what must be one of {list(BUDGETS)}; got {what!r}. Use one of these."
        )
    if not conditioning >= 1:
        raise ValueError(
            f"tolerance: conditioning must be at least 1; got {conditioning}. For a problem that "
            f"damps its errors pass conditioning=1."
        )
    own = _eps(dtype)
    accumulated = min(own, _eps(np.float32))
    narrowing = roundings * own / 2 if own > accumulated else 0.0
    return floor * (BUDGETS[what] * conditioning * accumulated + narrowing)


class _Worst(NamedTuple):
    """The element with the largest error, and the errors of all elements."""

    units: float
    position: tuple[int, ...]
    error: float
    unit: float
    beyond: NDArray[Any]  # longdouble, shape of the result: the error of each element in units


def _measure(
    actual: ArrayLike,
    desired: ArrayLike,
    dtype: DTypeLike | None,
    what: What,
    axis: Axes | None,
    floor: float,
) -> _Worst:
    got, wanted = np.asarray(actual), np.asarray(desired)
    if got.shape != wanted.shape:
        raise AssertionError(f"shapes differ: got {got.shape}, wanted {wanted.shape}")
    judged = got.dtype if dtype is None else np.dtype(dtype)
    eps = _eps(judged)
    if got.size == 0:
        return _Worst(0.0, (), 0.0, eps * floor, np.zeros(got.shape))
    got, wanted = _wide(got), _wide(wanted)
    magnitude = _abs(wanted)
    if what == "derivative":
        finite = np.where(np.isfinite(magnitude), magnitude, 0)
        magnitude = np.max(finite, axis=axis, keepdims=True)
    unit = np.broadcast_to(eps * np.maximum(floor, magnitude), got.shape)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = _abs(got - wanted)
        units = np.where(error == 0, 0, error / unit)
        # An infinity is right if the desired value is infinite or rounds to infinity.
        if not (np.iscomplexobj(got) or np.iscomplexobj(wanted)):
            wanted = _wide(wanted.astype(_real(judged)))
    units = np.where((got == wanted) & ~np.isfinite(got), 0, units)
    units = np.where(np.isnan(units), np.inf, units)
    index = tuple(int(i) for i in np.unravel_index(np.argmax(units), units.shape))
    return _Worst(float(units[index]), index, float(error[index]), float(unit[index]), units)


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    is_complex = np.issubdtype(array.dtype, np.complexfloating)
    return array.astype(np.clongdouble if is_complex else np.longdouble)


def _abs(array: NDArray[Any]) -> NDArray[Any]:
    return np.hypot(np.real(array), np.imag(array)) if np.iscomplexobj(array) else np.abs(array)


def rounding_units(
    actual: ArrayLike,
    desired: ArrayLike,
    dtype: DTypeLike | None = None,
    *,
    what: What = "value",
    axis: Axes | None = None,
    floor: float = 1.0,
) -> float:
    """The worst error of `actual`, in units of rounding of `dtype`.

    max_i |actual_i - desired_i| / unit_i, with the units of the module's docstring. NaN counts as
    infinity; an infinity counts as right where the desired value rounds to it.

    Args:
        actual: the computed array, of any dtype that NumPy reads (bfloat16 too).
        desired: the right array, of the same shape.
        dtype: the dtype whose rounding is the unit. None means that of `actual`.
        what: "value" or "derivative".
        axis: for derivatives, the axes over which the largest |desired| is taken, which gives one
            scale for each slice. None gives one scale for the whole array.
        floor: the smallest magnitude that counts; 1 unless results are known to be small
            throughout.

    Returns:
        A Python float; zero for empty arrays.

    Raises:
        AssertionError: shapes differ.
        TypeError: dtype is not floating or complex.

    Source: Higham 2002, chapter 2.

    Example:
        >>> rounding_units([1.0 + 2.0**-22], [1.0], "float32")
        2.0
        >>> rounding_units([float("nan")], [1.0], "float32")
        inf
    """
    return _measure(actual, desired, dtype, what, axis, floor).units


def assert_close(
    actual: ArrayLike,
    desired: ArrayLike,
    dtype: DTypeLike | None = None,
    *,
    what: What = "value",
    conditioning: float = 1.0,
    axis: Axes | None = None,
    floor: float = 1.0,
    roundings: int = 1,
    name: str = "result",
) -> None:
    """Assert that no element errs by more than its dtype and conditioning allow.

    Args:
        actual: the computed array.
        desired: the right array, of the same shape; usually from `jaxnorm.testing.oracle`.
        dtype: the dtype whose rounding is the unit. None means that of `actual`.
        what: "value" or "derivative".
        conditioning: factor on the budget; see `condition_number`.
        axis: for derivatives, the axes of one scale; see `rounding_units`.
        floor: smallest magnitude that counts; see `rounding_units`.
        roundings: how often the result is rounded to a narrow dtype; see `tolerance`.
        name: the name of the array in a failure.

    Returns:
        None.

    Raises:
        AssertionError: an element is beyond its budget, or the shapes differ; the message tells
            the worst element, what it is, what it should be, and the error in units.
        TypeError: dtype is not floating or complex.
        ValueError: `what` or `conditioning` is not valid; see `tolerance`.

    Source: the module's docstring.

    Example:
        >>> assert_close([1.0, 2.0], [1.0, 2.0 + 1e-6], "float32")
        >>> assert_close([1.0, 2.0], [1.0, 2.1], "float32", name="y")
        Traceback (most recent call last):
        AssertionError: y: 1 of 2 elements beyond the budget (value, float32)
          worst at  (1,)
          got       2.0
          wanted    2.1
          error     0.1 = 3.99e+05 units of 2.5e-07
          budget    32 units (conditioning 1)
    """
    judged = np.asarray(actual).dtype if dtype is None else np.dtype(dtype)
    allowed = tolerance(judged, what=what, conditioning=conditioning, roundings=roundings)
    budget = allowed / _eps(judged)
    try:
        worst = _measure(actual, desired, judged, what, axis, floor)
    except AssertionError as difference:
        raise AssertionError(f"{name}: {difference}") from None
    if worst.units <= budget:
        return
    count = int(np.sum(worst.beyond > budget))
    got, wanted = np.asarray(actual)[worst.position], np.asarray(desired)[worst.position]
    raise AssertionError(
        f"{name}: {count} of {worst.beyond.size} elements beyond the budget ({what}, {judged})\n"
        f"  worst at  {worst.position}\n"
        f"  got       {got}\n"
        f"  wanted    {wanted}\n"
        f"  error     {worst.error:.3g} = {worst.units:.3g} units of {worst.unit:.3g}\n"
        f"  budget    {budget:.4g} units (conditioning {conditioning:.4g})"
    )


def sum_conditioning(terms: int) -> float:
    """The conditioning of a sum: max(1, sqrt(terms / 1024)).

    Adding m terms one after the other errs by about sqrt(m) * eps of the sum of their magnitudes,
    rounding errors being independent; a tree of partial sums errs by less. The budget covers
    m = 1024. It applies to values (their variance is such a sum) and to derivatives.

    Args:
        terms: the number of elements that are added up.

    Returns:
        A Python float, at least 1.

    Raises:
        Nothing.

    Source: Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis".

    Example:
        >>> sum_conditioning(100), sum_conditioning(4096)
        (1.0, 2.0)
    """
    return math.sqrt(max(1.0, terms / TERMS_IN_BUDGET))


def condition_number(
    x: ArrayLike,
    axis: Axes | None,
    epsilon: float,
    *,
    mask: ArrayLike | None = None,
    centered: bool = True,
    terms: int | None = None,
) -> float:
    """The factor by which the derivative of standardizing `x` magnifies rounding errors.

    The backward pass applies the symmetric map A = rstd * (I - 1 1'/n - xhat xhat'/n) to the
    cotangent of xhat, which is taken to be of order 1 (else multiply). Its terms are of order
    rstd and err by a few eps * rstd, in which the mean's and the deviation's own errors are
    contained. The result is of order |A|. Hence the error in units is a few times

        cancellation = rstd / max(1, |A|),       |A| = rstd                    if n >= 3,
                                                 |A| = rstd * epsilon / (var + epsilon)   if n = 2,
                                                 |A| = 0                       if n = 1,

    since 1 and xhat span the whole space if n = 2, and A takes 1 to 0 and xhat to
    rstd * epsilon / (var + epsilon) * xhat. So a large rstd (a nearly constant slice) costs nothing
    if the result is as large, and costs its full size if the terms cancel. RMS norm does not
    center, so there one element counts as two. A complex element counts as two real ones, and so
    does a complex mean that is subtracted.

    The result is multiplied with `sum_conditioning` of the slice's count, or of `terms` if that is
    more. For dscale and dbias, pass the number of elements that are added up.

    The cotangent is assumed not to lie, by chance or design, almost in the span of 1 and xhat:
    for a constant cotangent the derivative is zero and its error is not.

    Args:
        x: real or complex, any shape.
        axis: the axes of the moments. None means all axes.
        epsilon: the epsilon of the normalization.
        mask: broadcastable to x; nonzero means included.
        centered: False for RMS norm.
        terms: the length of the longest sum, if it is longer than the slice.

    Returns:
        A Python float, at least 1: the largest over the slices.

    Raises:
        ValueError: axes or mask do not fit x.

    Source: Higham 2002, section 1.7 (cancellation); the norms of A are derived above.

    Example:
        >>> condition_number([[0.0, 1.0, 5.0]], -1, 1e-6)
        1.0
        >>> round(condition_number([[0.0, 2e-3]], -1, 1e-6))
        2
        >>> condition_number([[7.0]], -1, 1e-6)
        1000.0
    """
    values = _wide(np.asarray(x))
    axes = tuple(range(values.ndim)) if axis is None else axis
    included = np.broadcast_to(True if mask is None else np.asarray(mask) != 0, values.shape)

    def total(array: NDArray[Any]) -> NDArray[Any]:
        return np.sum(np.where(included, array, 0), axis=axes, keepdims=True)

    count = np.sum(included, axis=axes, keepdims=True)
    safe = np.maximum(count, 1)
    if centered:
        # Subtract twice: the first mean is rounded if the offset is large.
        values = values - total(values) / safe
        values = values - total(values) / safe
    shifted = total(_abs(values) ** 2) / safe + epsilon
    empty = (count == 0) | (shifted == 0)
    rstd = np.where(empty, 0, 1 / np.sqrt(np.where(empty, 1, shifted)))
    left = epsilon / np.where(empty, 1, shifted)
    parts = 2 if np.iscomplexobj(values) else 1
    spanned = 1 + parts * centered
    free = parts * count - spanned  # directions that A multiplies by rstd
    norm = rstd * np.where(free > 0, 1, np.where(free == 0, left, 0))
    cancellation = np.max(rstd / np.maximum(1, norm), initial=1)
    longest = max(int(np.max(count, initial=0)), terms or 0)
    return float(cancellation) * sum_conditioning(longest)
