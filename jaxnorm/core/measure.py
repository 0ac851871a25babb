"""Measure the slices of an array, at any offset.

`LocalMoments` is what normalization needs: moments seen from a value near the data, because a
mean rounded to float32 is off by 1e-3 at an offset of 1e4, and so would be everything that is
normalized with it.

``z = x - guess`` and one read of ``x`` give ``mean(z)`` and ``mean(|z|^2) - |mean(z)|^2``. The
subtraction in that formula costs about ``log2(1 + |mean(z)|^2 / var)`` bits, so it is exact enough
whenever the guess lies within a few deviations of the mean.

* Batch normalization has such a guess at hand, its running mean. Where it turns out to be a poor
  one (the first steps of training, a jump), a branch does what the others do.
* The others have none, and always read twice: slices are short there, or come in many, and a
  branch would need one answer for all of them, hence from all devices that hold some.

Nothing depends on the guess but the time it takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import narrow
from jaxnorm.core.blocks import fold, settled, spread
from jaxnorm.core.excerpts import element_of, sample_of
from jaxnorm.core.layout import in_order
from jaxnorm.core.moments import Moments, abs_squared, saturate
from jaxnorm.core.replicas import ALONE, Alone

# A guess within this many deviations of the mean costs at most log2(1 + 2**2) = 2.3 bits of the
# variance; a running mean lies closer.
_NEAR = 2.0

# Elements of an array from which on more is compiled to make it faster; see `Reduction.worth_it`.
LARGE = 2**16


class LocalMoments(NamedTuple):
    """What it takes to standardize `x`, with size 1 (or the number of blocks) on reduced axes.

    The mean comes in two parts, `origin` + `mean`, since one float32 near 1e4 cannot hold it.
    """

    origin: Inexact[Array, "*slices"]
    """A value near the data; constant under differentiation, since no result depends on it."""
    mean: Inexact[Array, "*slices"]
    """Mean of x - origin."""
    rstd: Float[Array, "*slices"]
    """1 / sqrt(var + epsilon); 0 for a slice with no element, or with var + epsilon = 0."""

    def standardize(self, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """``xhat = (x - origin - mean) / sqrt(var + epsilon)`` in the dtype of the moments."""
        dtype = self.mean.dtype
        origin, mean, rstd = (spread(part, x) for part in self)
        return ((x.astype(dtype) - origin) - mean) * rstd.astype(dtype)

    def over(self, reduction: "Reduction", x: Inexact[Array, "*shape"]) -> "LocalMoments":
        """The same with size 1 or that of `x` on all axes: those of blocks, for each entry."""
        return LocalMoments(*(self.spread(reduction, part, x) for part in self))

    def spread(self, reduction: "Reduction", part: Inexact[Array, "*slices"], x) -> Array:
        """What belongs to blocks of an axis, for each of its entries."""
        wide = spread(part, x)
        if wide.shape == part.shape or not reduction.worth_it(x):
            return wide
        return settled(wide, spread(self.rstd, x))

    @classmethod
    def known(cls, mean: Inexact[Array, "*slices"], var: Float[Array, "*slices"], epsilon: float):
        """From statistics that are given, as in evaluation."""
        return cls(mean, jnp.zeros_like(mean), _reciprocal_root(var + epsilon))


class Measured(NamedTuple):
    """Result of a measurement: the local moments, and the absolute ones for whoever keeps them."""

    local: LocalMoments
    count: Float[Array, "*slices"]  # pyright: ignore[reportIncompatibleMethodOverride]
    var: Float[Array, "*slices"]
    """Biased variance of x; saturates at the largest finite number."""

    @property
    def mean(self) -> Inexact[Array, "*slices"]:
        """Mean of x, rounded once."""
        return self.local.origin + self.local.mean

    def as_moments(self, axes: tuple[int, ...]) -> Moments:
        """The public form, with the reduced axes dropped."""
        m2 = saturate(self.var * self.count)
        return Moments(*(jnp.squeeze(a, axes) for a in (self.count, self.mean, m2)))


@dataclass(frozen=True)
class Reduction:
    """The static half of a measurement: which elements make up a slice, and epsilon."""

    axes: tuple[int, ...]
    epsilon: float = 0.0
    replicas: Alone = ALONE
    centered: bool = True
    """False for raw second moments (RMS normalization): origin and mean are zero."""
    two_pass: bool = False
    """The textbook's way, with a rounded mean; see `_measure_two_pass`."""
    blocks: tuple[int, int] | None = None
    """A further axis, and the number of blocks of consecutive entries in which it is reduced."""
    stored: jax.typing.DTypeLike | None = None
    """What `x` was widened from, if it was: the branch of a poor guess reads it in that form."""
    at_hand: bool = False
    """Whether `x` is a block in fast memory, as in a kernel: all of it can be read for nothing."""

    def size(self, shape: tuple[int, ...]) -> int | Array:
        """Elements in a slice of an array of this shape, over all replicas."""
        number = math.prod(shape[a] for a in self.axes)
        if self.blocks is not None:
            axis, blocks = self.blocks
            number *= shape[axis] // blocks
        return number * self.replicas.size()

    def worth_it(self, x: Inexact[Array, "*shape"]) -> bool:
        """Whether the time to normalize `x` outweighs that to compile what makes it faster.

        That is for one device, or one that does not know of others.
        """
        # A symbolic size (jax.export) may be anything.
        large = all(isinstance(n, int) for n in x.shape) and x.size >= LARGE
        return large and not self.at_hand and jax.typeof(x).sharding.mesh.empty

    def over(self, reducer: Callable, array: Array) -> Array:
        """What jnp.sum, jnp.min or their like make of each slice, without the replicas."""
        reduced = reducer(array, axis=self.axes, keepdims=True)
        return reduced if self.blocks is None else fold(reducer, reduced, *self.blocks)


def take(
    reduction: Reduction,
    x: Inexact[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None,
) -> Measured:
    """The moments of the slices of `x`, from a guess of their means; None: from one of its own."""
    x = _row_major(reduction, x)
    if not reduction.centered:
        return _measure_about_zero(reduction, x, mask)
    if reduction.two_pass:
        return _measure_two_pass(reduction, x, mask)
    size, unguessed = reduction.size(x.shape), guess is None and not reduction.at_hand
    if unguessed and isinstance(size, int) and narrow.exact(reduction.stored, size):
        return _measure_narrow(reduction, x, mask, size)
    if guess is None or reduction.replicas.mapped:
        return _measure_anew(reduction, x, mask)
    guess = guess.astype(x.dtype)
    count, mean, square = _means(reduction, x, mask, origin=guess)
    var = jnp.maximum(square - abs_squared(mean), 0)
    near = jnp.abs(mean) <= _NEAR * jnp.sqrt(var)
    finite = square < _big(square.dtype)
    # A branch's operands are arrays in memory. Narrowed, this one is the array that is there
    # already (narrowing undoes the widening exactly, and the compiler drops both).
    stored = x if reduction.stored is None else x.astype(reduction.stored)

    # Both branches must have one type, also where the guess is spread over more devices than x.
    zero = (mean == 0) & (guess == 0) & False

    def typed(measured: Measured) -> Measured:
        return jax.tree.map(lambda part: part + zero.astype(part.dtype), measured)

    def kept() -> Measured:
        return typed(Measured(_local(reduction, guess, mean, count, var), count, var))

    def again() -> Measured:
        return typed(_measure_anew(reduction, stored.astype(x.dtype), mask))

    return lax.cond(_all(reduction.replicas.agreed(near & finite)), kept, again)


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
    count, first, square = _sums(reduction, x.shape, mask, z, abs_squared(z))
    n = jnp.maximum(count, 1)
    return count, first / n.astype(first.dtype), square / n


def _measure_anew(reduction: Reduction, x, mask) -> Measured:
    plain = mask is None and reduction.replicas == ALONE and not jnp.iscomplexobj(x)
    if not (plain and reduction.worth_it(x)):
        return _measure_twice(reduction, x, mask)
    return lax.platform_dependent(
        x,
        cpu=partial(_measure_about_sample, reduction),
        default=lambda x: _measure_twice(reduction, x, None),
    )


def _measure_about_sample(reduction: Reduction, x) -> Measured:
    """The moments about the mean of an eighth of each slice.

    For CPUs, where sums of `x` and of its squares run at the speed of memory, and those of anything
    else need an array of it first: of the differences, once.
    """
    size = jnp.asarray(reduction.size(x.shape), x.dtype)  # an int may be larger than an int32
    scale = _fitting(reduction.over(jnp.sum, lax.square(x)) / size)
    sample, element = sample_of(reduction, x)
    wide = spread(scale, x)
    element = element * scale
    offset = reduction.over(jnp.sum, sample * wide - spread(element, x))
    offset = _clipped(offset / jnp.asarray(reduction.size(sample.shape), x.dtype))
    return _measure_about(reduction, x, None, element + offset, scale)


def _measure_twice(reduction: Reduction, x, mask) -> Measured:
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
    return _measure_about(reduction, x, mask, element * unit + _clipped(offset) * unit, scale)


def _fitting(square):
    """A scale for data with that mean square, 1 unless it overflows: squares are summed in it.

    Source: Blue, "A portable Fortran program to find the Euclidean norm of a vector", 1978.
    """
    one, small = (lax.full_like(square, a) for a in (1, _rescale(square.dtype)))
    return lax.select(square < _big(square.dtype), one, small)


def _measure_about(reduction: Reduction, x, mask, origin, scale) -> Measured:
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
    return _rescaled(reduction, count, origin, mean, var, scale, masked=mask is not None)


def _rescaled(reduction: Reduction, count, origin, mean, var, scale, *, masked: bool) -> Measured:
    """From the moments of x * scale."""
    n = lax.max(count, lax.full_like(count, 1))
    # An element lies at most sqrt(n) deviations from the mean, any two 2 sqrt(n) from each other.
    # Where that could overflow, at the very end of the range, nothing is subtracted.
    limit = float(jnp.finfo(var.dtype).max) / 2
    within = lax.sqrt(var) < limit * scale / lax.sqrt(n)
    unit = lax.select(within, scale, lax.full_like(scale, jnp.inf)).astype(origin.dtype)
    local = _local(reduction, origin / unit, mean / unit, count, var, scale, masked=masked)
    # Not divided twice: that may become one division, by a square that is zero.
    back = lax.select(scale == 1, scale, lax.full_like(scale, 1 / _rescale(var.dtype)))
    return Measured(local, count, saturate(var * back * back))


def _measure_narrow(reduction: Reduction, x, mask, size: int) -> Measured:
    """Moments of 16-bit numbers in one read; see `jaxnorm.core.narrow`."""
    real = x.dtype
    z = x if mask is None else jnp.where(mask, x, 0)
    terms = narrow.terms(z, reduction.stored, size, _rescale(real))
    count, *sums = _sums(reduction, x.shape, mask, *terms)
    solved = narrow.solve(count, sums, reduction.stored, size, _rescale(real), _big(real))
    return _rescaled(reduction, count, *solved, masked=mask is not None)


def _measure_about_zero(reduction: Reduction, x, mask) -> Measured:
    """Raw second moments of any finite data, in one read: squares summed at two scales."""
    real = jnp.finfo(x.dtype).dtype
    down = _rescale(real)
    z = x if mask is None else jnp.where(mask, x, 0)
    small = z * jnp.asarray(down, x.dtype)
    count, *sums = _sums(reduction, x.shape, mask, abs_squared(z), abs_squared(small))
    square, small_square = (total / lax.max(count, lax.full_like(count, 1)) for total in sums)
    scale = _fitting(square)
    fits = scale == 1
    var = lax.select(fits, square, small_square)
    zero = jnp.zeros((1,) * x.ndim, x.dtype)
    local = _local(reduction, zero, zero, count, var, scale, masked=mask is not None)
    back = lax.select(fits, scale, lax.full_like(scale, 1 / down))
    return Measured(local, count, saturate(var * back * back))


def _measure_two_pass(reduction: Reduction, x, mask) -> Measured:
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


def _reciprocal_root(x):
    """1 / sqrt(x), and 0 at 0: a slice without spread standardizes to zero, not to NaN."""
    zero = x == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, x)))


def _row_major(reduction: Reduction, x):
    """The same `x`; the compiler is told that rows which are reduced lie in one piece.

    Left to choose, XLA for TPUs lays whole networks out by columns around the sums of rows, and
    copies what enters and leaves them.
    """
    trailing = tuple(range(x.ndim - len(reduction.axes), x.ndim))
    if reduction.at_hand or reduction.blocks is not None or reduction.axes != trailing:
        return x
    return in_order(x, range(x.ndim))


@custom_vmap
def _all(condition) -> Bool[Array, ""]:
    return jnp.all(condition)


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
