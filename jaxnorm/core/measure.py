"""Measure the slices of an array, exactly at any offset.

`LocalMoments` is what normalization needs: moments seen from a value near the data, because a
mean rounded to float32 is off by 1e-3 at an offset of 1e4, and so would be everything that is
normalized with it.

``z = x - origin`` and one read of ``x`` give ``mean(z)`` and ``mean(|z|^2) - |mean(z)|^2``. The
subtraction in that formula costs about ``log2(1 + |mean(z)|^2 / var)`` bits, so it is exact enough
whenever the origin lies within a few deviations of the mean. The ways to measure differ in where
they take the origin from. README.md beside this file says which input is measured in which way.
"""

import enum
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core import exact_sums
from jaxnorm.core.moments import LocalMoments, Measured, abs_squared, saturate
from jaxnorm.core.probe import element_of
from jaxnorm.core.slices import Slices
from jaxnorm.core.tpu import row_major

# A guess within this many deviations of the mean costs at most log2(1 + 2**2) = 2.3 bits of the
# variance; a running mean lies closer.
NEAR = 2.0


@dataclass(frozen=True)
class Measurement:
    """A measurement of an array: the static half of a normalization, without its affine part."""

    slices: Slices
    epsilon: float = 0.0
    centered: bool = True
    """False for raw second moments (RMS normalization): origin and mean are zero."""
    two_pass: bool = False
    """Whether to reproduce the textbook's two passes; see `Way.TWO_PASS`."""

    def with_leading_axis(self) -> "Measurement":
        """This measurement for arrays with one more axis in front."""
        return replace(self, slices=self.slices.with_leading_axis())


class Way(enum.Enum):
    """A way to measure. `core.strategy` chooses one."""

    TWO_PASS = "mean(x), rounded, then mean(|x - mean|^2)"
    RAW = "mean(|x|^2) in one read, at two scales"
    EXACT_SUMS = "sums without rounding in one read, of 16-bit numbers"
    GUESS = "one read about a guess; if that was a poor one, TWO_READS"
    TWO_READS = "a mean about one element, then the moments about that mean"


@dataclass(frozen=True)
class Strategy:
    """The way in which an array is measured. Results depend on it only by rounding."""

    way: Way
    stored: jax.typing.DTypeLike | None = None
    """The dtype that `x` was widened from, if it was."""
    row_major: bool = False
    """Whether compilers for TPUs are told that the slices lie in memory as rows."""
    in_block: bool = False
    """Whether `x` is a block in fast memory, as in a kernel: all of it can be read for nothing."""
    cpu_measured: bool = False
    """Whether a CPU measures it in its own way; see `core.cpu`."""
    cpu_large: bool = False
    """Whether CPUs get what pays for its compile time on large arrays only; see `core.cpu`."""

    def narrowed(self, x: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """The array as it lies in memory, which is what a branch takes as its operand.

        Narrowed, that is the array that is there already: narrowing undoes the widening exactly,
        and the compiler drops both.
        """
        return x if self.stored is None else x.astype(self.stored)


class _Scaled(NamedTuple):
    """Moments of ``x * scale - origin``, by any of the ways; what follows them is common."""

    count: Float[Array, "*slices"]  # pyright: ignore[reportIncompatibleMethodOverride]
    origin: Inexact[Array, "*slices"]
    mean: Inexact[Array, "*slices"]
    var: Float[Array, "*slices"]
    scale: Float[Array, "*slices"]
    """1, or a power of two for squares that would overflow."""


def measure(
    measurement: Measurement,
    strategy: Strategy,
    x: Inexact[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None,
) -> Measured:
    """The moments of the slices of `x`, on any platform.

    Args:
        measurement: what to measure.
        strategy: how.
        x: the data in the dtype that it is to be computed in, float32 at least.
        mask: which elements count; None for all.
        guess: a value expected near the mean of each slice, the same on all replicas; only
            `Way.GUESS` uses it.
    """
    if strategy.row_major:
        x = row_major(x)
    slices = measurement.slices
    match strategy.way:
        case Way.TWO_PASS:
            return _two_pass(measurement, x, mask)
        case Way.RAW:
            scaled = _raw(slices, x, mask)
        case Way.EXACT_SUMS:
            scaled = _exact_sums(slices, strategy.stored, x, mask)
        case Way.TWO_READS:
            scaled = _two_reads(slices, strategy.in_block, x, mask)
        case Way.GUESS:
            scaled = _near_guess(measurement, strategy, x, mask, guess)
    return _rescaled(measurement, scaled, masked=mask is not None)


def _rescaled(measurement: Measurement, scaled: _Scaled, *, masked: bool) -> Measured:
    """The moments of `x` itself, from those of scaled data."""
    count, origin, mean, var, scale = scaled
    n = lax.max(count, lax.full_like(count, 1))
    # An element lies at most sqrt(n) deviations from the mean, any two 2 sqrt(n) from each other.
    # Where that could overflow, at the very end of the range, nothing is subtracted.
    limit = float(jnp.finfo(var.dtype).max) / 2
    within = lax.sqrt(var) < limit * scale / lax.sqrt(n)
    unit = lax.select(within, scale, lax.full_like(scale, jnp.inf)).astype(origin.dtype)
    if measurement.centered:
        origin, mean = origin / unit, mean / unit
    local = _local(measurement.epsilon, origin, mean, count, var, scale, masked=masked)
    # Not divided twice: that may become one division, by a square that is zero.
    back = lax.select(scale == 1, scale, lax.full_like(scale, 1 / _rescale(var.dtype)))
    return Measured(local, count, saturate(var * back * back))


def _near_guess(measurement: Measurement, strategy: Strategy, x, mask, guess) -> _Scaled:
    """The moments about a guess, or where that is a poor one those of two reads."""
    slices = measurement.slices
    guess = guess.astype(x.dtype)
    count, mean, square = _means(measurement, x, mask, origin=guess)
    # Where both overflow their difference is infinite, and no NaN for `checkify` to report.
    largest = lax.full_like(square, jnp.finfo(square.dtype).max)
    var = jnp.maximum(square - lax.min(abs_squared(mean), largest), 0)
    near = jnp.abs(mean) <= NEAR * jnp.sqrt(var)
    finite = square < _big(square.dtype)
    stored = strategy.narrowed(x)

    # Both branches must have one type, also where the guess is on more devices than x.
    zero = (mean == 0) & (guess == 0) & False

    def typed(*parts):
        return [part + zero.astype(part.dtype) for part in parts]

    def of_guess():
        return typed(guess, mean, var, lax.full_like(var, 1))

    def of_two_reads():
        return typed(*_two_reads(slices, False, stored.astype(x.dtype), mask)[1:])

    good = all_true(slices.replicas.agreed(near & finite))
    return _Scaled(count, *lax.cond(good, of_guess, of_two_reads))


def _sums(slices: Slices, shape, mask, *terms):
    """Count of each slice and sums of terms that are zero outside the mask, in one collective."""
    total = partial(slices.reduce, jnp.sum)
    if mask is None:
        found = slices.replicas.sum(*map(total, terms))
        return jnp.full_like(found[-1], slices.size(shape)), *found
    inside = jnp.broadcast_to(mask, shape).astype(terms[-1].dtype)
    return slices.replicas.sum(total(inside), *map(total, terms))


def _means(measurement: Measurement, x, mask, *, origin):
    """Count, mean(z) and mean(|z|^2) for z = x - origin, in one read of x."""
    z = x - measurement.slices.broadcast(origin, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    terms = (z, abs_squared(z)) if measurement.centered else (abs_squared(z),)
    count, *first, square = _sums(measurement.slices, x.shape, mask, *terms)
    n = jnp.maximum(count, 1)
    mean = first[0] / n.astype(x.dtype) if first else jnp.zeros_like(origin)
    return count, mean, square / n


def _two_reads(slices: Slices, in_block: bool, x, mask) -> _Scaled:
    """The moments about a first mean, for which a first read is taken about an element."""
    element = element_of(slices, x, mask, in_block=in_block)
    z = x - slices.broadcast(element, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    # Scaled down, since here the sum alone may be too large.
    down = jnp.asarray(2.0**-24, x.dtype)
    count, offset, square = _sums(slices, x.shape, mask, z * down, abs_squared(z))
    n = lax.max(count, lax.full_like(count, 1))
    offset, scale = offset / (n.astype(x.dtype) * down), _fitting(square / n)
    unit = scale.astype(x.dtype)
    # The compiler computes the origin anew in each of its uses. They must round it alike: clipped,
    # the product that `offset` is cannot melt into a fused multiply-add in one and not in another.
    # For a slice of one repeated value it is that value, so that x - origin is exactly zero.
    origin = element * unit + _clipped(offset) * unit
    z = x * slices.broadcast(unit, x) - slices.broadcast(origin, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    count, mean, square = _sums(slices, z.shape, mask, z, abs_squared(z))
    mean = mean / n.astype(mean.dtype)
    var = lax.max(square / n - abs_squared(mean), lax.full_like(square, 0))
    return _Scaled(count, origin, mean, var, scale)


def _raw(slices: Slices, x, mask) -> _Scaled:
    """Raw second moments of any finite data, in one read: squares summed at two scales."""
    z = x if mask is None else jnp.where(mask, x, 0)
    small = z * jnp.asarray(_rescale(jnp.finfo(x.dtype).dtype), x.dtype)
    count, *found = _sums(slices, x.shape, mask, abs_squared(z), abs_squared(small))
    square, small_square = (total / lax.max(count, lax.full_like(count, 1)) for total in found)
    scale = _fitting(square)
    zero = jnp.zeros((1,) * x.ndim, x.dtype)
    return _Scaled(count, zero, zero, lax.select(scale == 1, square, small_square), scale)


def _exact_sums(slices: Slices, stored, x, mask) -> _Scaled:
    """Moments of 16-bit numbers in one read; see `jaxnorm.core.exact_sums`."""
    real, size = x.dtype, int(slices.size(x.shape))  # which `strategy` knows to be no array
    z = x if mask is None else jnp.where(mask, x, 0)
    terms = exact_sums.terms(z, stored, size, _rescale(real))
    count, *found = _sums(slices, x.shape, mask, *terms)
    return _Scaled(count, *exact_sums.solve(count, found, stored, size, _rescale(real), _big(real)))


def _two_pass(measurement: Measurement, x, mask) -> Measured:
    """mean(x), rounded, then mean(|x - mean|^2): what Flax does with use_fast_variance=False.

    Kept for reproducing numbers, not for its digits: at an offset of 1e4 deviations the rounding
    of the mean alone moves every float32 result by 1e-3.
    """
    slices = measurement.slices
    if slices.replicas.is_single and slices.blocks is None:
        # jnp.mean, and not a sum divided here: its last bit is what is to be reproduced.
        mean = jnp.mean(x, axis=slices.axes, keepdims=True, where=mask)
        mean = mean if mask is None else jnp.where(jnp.isnan(mean), 0, mean)
    else:
        zero = jnp.zeros((1,) * x.ndim, x.dtype)
        _, mean, _ = _means(measurement, x, mask, origin=zero)
    count, _, var = _means(measurement, x, mask, origin=mean)
    local = _local(measurement.epsilon, mean, jnp.zeros_like(mean), count, var)
    return Measured(local, count, saturate(var))


def _local(
    epsilon: float,
    origin,
    mean,
    count,
    var,
    scale: Array | float = 1.0,
    *,
    masked: bool = True,
) -> LocalMoments:
    """Local moments from the variance of data that was scaled.

    rstd is zero where there is no deviation: such a slice standardizes to zero, not to NaN.
    """
    var = var + epsilon * scale * scale
    zero = (var == 0) | (count == 0) if masked else var == 0
    scale = jnp.where(zero, jnp.zeros((), var.dtype), jnp.asarray(scale, var.dtype))
    # The division comes last: what ends in one CPUs compute once (`cpu.materialize`). A division
    # by a root would become a product.
    root = lax.max(lax.sqrt(var), lax.full_like(var, jnp.finfo(var.dtype).tiny))
    return LocalMoments(origin, mean, scale / root)


def _fitting(square):
    """A scale for data with that mean square, 1 unless it overflows: squares are summed in it.

    Source: Blue, "A portable Fortran program to find the Euclidean norm of a vector", 1978.
    """
    one, small = (lax.full_like(square, a) for a in (1, _rescale(square.dtype)))
    return lax.select(square < _big(square.dtype), one, small)


@custom_vmap
def all_true(condition) -> Bool[Array, ""]:
    """True if a condition holds in all slices, of all members of a vmapped batch."""
    # A sum, for which CPUs need one compiled function; for jnp.all it is three.
    return jnp.sum(jnp.where(condition, 0.0, 1.0), dtype=jnp.float32) == 0


@all_true.def_vmap
def _all_true_vmap(axis_size, in_batched, condition):
    # One answer for the whole batch: both branches are right for every member, and an unbatched
    # predicate keeps `cond` a branch where `vmap` would otherwise compute both.
    del axis_size, in_batched
    return all_true(condition), False


def _clipped(x):
    """An equal array, if it is finite: the real and imaginary parts saturate."""
    if jnp.iscomplexobj(x):
        return lax.complex(saturate(jnp.real(x)), saturate(jnp.imag(x)))
    return saturate(x)


def _big(dtype) -> float:
    """A mean square below this has not overflowed while it was summed."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 25 // 32)


def _rescale(dtype) -> float:
    """A power of two that brings the largest number of `dtype` safely below sqrt(_big)."""
    return 2.0 ** -(jnp.finfo(dtype).maxexp * 5 // 8)
