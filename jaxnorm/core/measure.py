"""Measure the slices of an array, at any offset.

`LocalMoments` is what normalization needs: moments seen from a value near the data, because a
mean rounded to float32 is off by 1e-3 at an offset of 1e4, and so would be everything that is
normalized with it.

``z = x - guess`` and one read of ``x`` give ``mean(z)`` and ``mean(|z|^2) - |mean(z)|^2``. The
subtraction in that formula costs about ``log2(1 + |mean(z)|^2 / var)`` bits, so it is exact enough
whenever the guess lies within a few deviations of the mean.

* Batch normalization has such a guess at hand, its running mean. Where it turns out to be a poor
  one (the first steps of training, a jump), a branch does what the others do.
* The others have none, and read twice: slices are short there, or come in many, and a branch would
  need one answer for all of them, hence from all devices that hold some. Short slices of 16-bit
  numbers are read once, with exact sums (`narrow`). On one CPU zero is a guess: there a branch is
  cheap, and an array of differences dear.

Nothing depends on the guess but the time it takes.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import narrow
from jaxnorm.core.blocks import settled, spread
from jaxnorm.core.excerpts import element_of, sample_of
from jaxnorm.core.layout import in_order
from jaxnorm.core.moments import abs_squared, saturate
from jaxnorm.core.replicas import ALONE
from jaxnorm.core.slices import LocalMoments, Measured, Reduction

# A guess within this many deviations of the mean costs at most log2(1 + 2**2) = 2.3 bits of the
# variance; a running mean lies closer.
_NEAR = 2.0


class _Scaled(NamedTuple):
    """Moments of ``x * scale - origin``; what a branch decides, and what follows it is common."""

    origin: Inexact[Array, "*slices"]
    mean: Inexact[Array, "*slices"]
    var: Float[Array, "*slices"]
    scale: Float[Array, "*slices"]
    """1, or a power of two for squares that would overflow."""


_Counted = tuple[Array, _Scaled]
"""How many elements each slice has, and their moments."""


def take(
    reduction: Reduction,
    x: Inexact[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None,
) -> Measured:
    """The moments of the slices of `x`, from a guess of their means; None: from one of its own."""
    x = _row_major(reduction, x)
    if reduction.two_pass and reduction.centered:
        return _two_pass(reduction, x, mask)
    if guess is None:
        count, scaled = _unguessed(reduction, x, mask)
    elif reduction.replicas.mapped:
        count, scaled = _twice(reduction, x, mask)
    else:

        def again(x, scale):
            about_sample = partial(_about_sample, reduction, scale=scale)
            return _by_platform(reduction, x, mask, cpu=about_sample, default=_twice)

        count, scaled = _near(reduction, x, mask, guess.astype(x.dtype), again)
    return _rescaled(reduction, count, scaled, masked=mask is not None)


def _rescaled(reduction: Reduction, count, scaled: _Scaled, *, masked: bool) -> Measured:
    """The moments of `x` itself, from those of scaled data."""
    origin, mean, var, scale = scaled
    n = lax.max(count, lax.full_like(count, 1))
    # An element lies at most sqrt(n) deviations from the mean, any two 2 sqrt(n) from each other.
    # Where that could overflow, at the very end of the range, nothing is subtracted.
    limit = float(jnp.finfo(var.dtype).max) / 2
    within = lax.sqrt(var) < limit * scale / lax.sqrt(n)
    unit = lax.select(within, scale, lax.full_like(scale, jnp.inf)).astype(origin.dtype)
    if reduction.centered:
        origin, mean = origin / unit, mean / unit
    local = _local(reduction, origin, mean, count, var, scale, masked=masked)
    # Not divided twice: that may become one division, by a square that is zero.
    back = lax.select(scale == 1, scale, lax.full_like(scale, 1 / _rescale(var.dtype)))
    return Measured(local, count, saturate(var * back * back))


def _near(reduction: Reduction, x, mask, guess, otherwise: Callable) -> _Counted:
    """The moments about the guess, or where that is a poor one what is said otherwise of `x`.

    That is also told a scale in which the squares of ``x - guess`` do not overflow.
    """
    count, mean, square = _means(reduction, x, mask, origin=guess)
    # Where both overflow their difference is infinite, and no NaN for `checkify` to report.
    largest = lax.full_like(square, jnp.finfo(square.dtype).max)
    var = jnp.maximum(square - lax.min(abs_squared(mean), largest), 0)
    near = jnp.abs(mean) <= _NEAR * jnp.sqrt(var)
    finite = square < _big(square.dtype)
    # A branch's operands are arrays in memory. Narrowed, this one is the array that is there
    # already (narrowing undoes the widening exactly, and the compiler drops both).
    stored = x if reduction.stored is None else x.astype(reduction.stored)

    # Both branches must have one type, also where the guess is spread over more devices than x.
    zero = (mean == 0) & (guess == 0) & False

    def typed(*parts) -> _Scaled:
        return _Scaled(*(part + zero.astype(part.dtype) for part in parts))

    def kept() -> _Scaled:
        return typed(guess, mean, var, lax.full_like(var, 1))

    def again() -> _Scaled:
        return typed(*otherwise(stored.astype(x.dtype), _fitting(square))[1])

    return count, lax.cond(_all(reduction.replicas.agreed(near & finite)), kept, again)


def _sums(reduction: Reduction, shape, mask, *terms):
    """Count of each slice and sums of terms that are zero outside the mask, in one collective."""
    total = partial(reduction.over, jnp.sum)
    if mask is None:
        sums = reduction.replicas.sum(*map(total, terms))
        return jnp.full_like(sums[-1], reduction.size(shape)), *sums
    inside = jnp.broadcast_to(mask, shape).astype(terms[-1].dtype)
    return reduction.replicas.sum(total(inside), *map(total, terms))


def _means(reduction: Reduction, x, mask, *, origin):
    """Count, mean(z) and mean(|z|^2) for z = x - origin, in one read of x."""
    z = x - spread(origin, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    terms = (z, abs_squared(z)) if reduction.centered else (abs_squared(z),)
    count, *first, square = _sums(reduction, x.shape, mask, *terms)
    n = jnp.maximum(count, 1)
    mean = first[0] / n.astype(x.dtype) if first else jnp.zeros_like(origin)
    return count, mean, square / n


def _unguessed(reduction: Reduction, x, mask) -> _Counted:
    measure, size = _twice, reduction.size(x.shape)
    if not reduction.centered:
        measure = _about_zero
    elif (
        not reduction.at_hand
        and isinstance(size, int)  # not a symbol
        and narrow.exact(reduction.stored, size)
    ):
        measure = partial(_narrow, size)
    # CPUs have a guess at no cost: of numbers less zero there is an array already.
    near_zero = partial(_near_zero, reduction)
    return _by_platform(reduction, x, mask, cpu=near_zero, default=measure)


def _by_platform(reduction: Reduction, x, mask, *, cpu: Callable, default: Callable) -> _Counted:
    """Measure as a CPU does where that is worth its compile time, and as other platforms do."""
    plain = mask is None and reduction.replicas == ALONE and not jnp.iscomplexobj(x)
    if not (plain and reduction.worth_it(x)):
        return default(reduction, x, mask)
    return lax.platform_dependent(x, cpu=cpu, default=lambda x: default(reduction, x, None))


def _near_zero(reduction: Reduction, x) -> _Counted:
    """The moments about zero, where all slices lie within a few deviations of it."""

    def otherwise(x, scale):
        if reduction.centered:
            return _about_sample(reduction, x, scale)
        return _about_zero(reduction, x, None)

    return _near(reduction, x, None, jnp.zeros((1,) * x.ndim, x.dtype), otherwise)


def _about_sample(reduction: Reduction, x, scale) -> _Counted:
    """The moments of ``x * scale`` about the mean of an eighth of each slice.

    For CPUs, where sums of `x` and of its squares run at the speed of memory, and those of anything
    else need an array of it first: of the differences, once.
    """
    sample, element = sample_of(reduction, x)
    wide = spread(scale, x)
    element = element * scale
    offset = reduction.over(jnp.sum, sample * wide - spread(element, x))
    offset = _clipped(offset / jnp.asarray(reduction.size(sample.shape), x.dtype))
    return _about(reduction, x, None, element + offset, scale)


def _twice(reduction: Reduction, x, mask) -> _Counted:
    """The moments about a first mean, for which a first read is taken about an element."""
    element = element_of(reduction, x, mask)
    z = x - spread(element, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    # Scaled down, since here the sum alone may be too large.
    down = jnp.asarray(2.0**-24, x.dtype)
    count, offset, square = _sums(reduction, x.shape, mask, z * down, abs_squared(z))
    n = lax.max(count, lax.full_like(count, 1))
    offset, scale = offset / (n.astype(x.dtype) * down), _fitting(square / n)
    unit = scale.astype(x.dtype)
    # The compiler computes the origin anew in each of its uses. They must round it alike: clipped,
    # the product that `offset` is cannot melt into a fused multiply-add in one and not in another.
    # For a slice of one repeated value it is that value, so that x - origin is exactly zero.
    return _about(reduction, x, mask, element * unit + _clipped(offset) * unit, scale)


def _fitting(square):
    """A scale for data with that mean square, 1 unless it overflows: squares are summed in it.

    Source: Blue, "A portable Fortran program to find the Euclidean norm of a vector", 1978.
    """
    one, small = (lax.full_like(square, a) for a in (1, _rescale(square.dtype)))
    return lax.select(square < _big(square.dtype), one, small)


def _about(reduction: Reduction, x, mask, origin, scale) -> _Counted:
    """The moments of `x` from those of ``x * scale - origin``."""
    wide, near = spread(scale.astype(x.dtype), x), spread(origin, x)
    if reduction.blocks is not None and reduction.worth_it(x):
        wide, near = settled(wide, near), settled(near, near)
    z = x * wide - near
    z = z if mask is None else jnp.where(mask, z, 0)
    count, mean, square = _sums(reduction, x.shape, mask, z, abs_squared(z))
    n = lax.max(count, lax.full_like(count, 1))
    mean = mean / n.astype(mean.dtype)
    var = lax.max(square / n - abs_squared(mean), lax.full_like(square, 0))
    return count, _Scaled(origin, mean, var, scale)


def _narrow(size: int, reduction: Reduction, x, mask) -> _Counted:
    """Moments of 16-bit numbers in one read; see `jaxnorm.core.narrow`."""
    real = x.dtype
    z = x if mask is None else jnp.where(mask, x, 0)
    terms = narrow.terms(z, reduction.stored, size, _rescale(real))
    count, *sums = _sums(reduction, x.shape, mask, *terms)
    solved = narrow.solve(count, sums, reduction.stored, size, _rescale(real), _big(real))
    return count, _Scaled(*solved)


def _about_zero(reduction: Reduction, x, mask) -> _Counted:
    """Raw second moments of any finite data, in one read: squares summed at two scales."""
    z = x if mask is None else jnp.where(mask, x, 0)
    small = z * jnp.asarray(_rescale(jnp.finfo(x.dtype).dtype), x.dtype)
    count, *sums = _sums(reduction, x.shape, mask, abs_squared(z), abs_squared(small))
    square, small_square = (total / lax.max(count, lax.full_like(count, 1)) for total in sums)
    scale = _fitting(square)
    zero = jnp.zeros((1,) * x.ndim, x.dtype)
    return count, _Scaled(zero, zero, lax.select(scale == 1, square, small_square), scale)


def _two_pass(reduction: Reduction, x, mask) -> Measured:
    """mean(x), rounded, then mean(|x - mean|^2): what Flax does with use_fast_variance=False.

    Kept for reproducing numbers, not for its digits: at an offset of 1e4 deviations the rounding
    of the mean alone moves every float32 result by 1e-3.
    """
    if reduction.replicas == ALONE and reduction.blocks is None:
        # jnp.mean, and not a sum divided here: its last bit is what is to be reproduced.
        mean = jnp.mean(x, axis=reduction.axes, keepdims=True, where=mask)
        mean = mean if mask is None else jnp.where(jnp.isnan(mean), 0, mean)
    else:
        zero = jnp.zeros((1,) * x.ndim, x.dtype)
        _, mean, _ = _means(reduction, x, mask, origin=zero)
    count, _, var = _means(reduction, x, mask, origin=mean)
    return Measured(_local(reduction, mean, jnp.zeros_like(mean), count, var), count, saturate(var))


def _local(
    reduction: Reduction,
    origin,
    mean,
    count,
    var,
    scale: Array | float = 1.0,
    *,
    masked: bool = True,
) -> LocalMoments:
    """Local moments from the variance of data that was scaled.

    rstd is zero where there is no spread: such a slice standardizes to zero, not to NaN.
    """
    var = var + reduction.epsilon * scale * scale
    zero = (var == 0) | (count == 0) if masked else var == 0
    scale = jnp.where(zero, jnp.zeros((), var.dtype), jnp.asarray(scale, var.dtype))
    # The division comes last, see `settled`. That by a root would become a product.
    root = lax.max(lax.sqrt(var), lax.full_like(var, jnp.finfo(var.dtype).tiny))
    return LocalMoments(origin, mean, scale / root)


def _row_major(reduction: Reduction, x):
    """An equal array of which the compiler is told that rows which are reduced lie in one piece.

    Left to choose, XLA for TPUs lays whole networks out by columns around the sums of rows, and
    copies what enters and leaves them.
    """
    trailing = tuple(range(x.ndim - len(reduction.axes), x.ndim))
    if reduction.at_hand or reduction.blocks is not None or reduction.axes != trailing:
        return x
    return in_order(x, range(x.ndim))


@custom_vmap
def _all(condition) -> Bool[Array, ""]:
    # A sum, for which CPUs need one compiled function; for jnp.all it is three.
    return jnp.sum(jnp.where(condition, 0.0, 1.0), dtype=jnp.float32) == 0


@_all.def_vmap
def _all_vmap(axis_size, in_batched, condition):
    # One answer for the whole batch: both branches are right for every member, and an unbatched
    # predicate keeps `cond` a branch where `vmap` would otherwise compute both.
    del axis_size, in_batched
    return _all(condition), False


def _clipped(x):
    if jnp.iscomplexobj(x):
        return lax.complex(saturate(jnp.real(x)), saturate(jnp.imag(x)))
    return saturate(x)


def _big(dtype) -> float:
    """A mean square below this has not overflowed while it was summed."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 25 // 32)


def _rescale(dtype) -> float:
    """A power of two that brings the largest number of `dtype` safely below sqrt(_big)."""
    return 2.0 ** -(jnp.finfo(dtype).maxexp * 5 // 8)
