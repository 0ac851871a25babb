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

from jaxnorm.core.blocks import fold, spread
from jaxnorm.core.moments import Moments, abs_squared, saturate
from jaxnorm.core.replicas import ALONE, Alone

# A guess within this many deviations of the mean costs at most log2(1 + 2**2) = 2.3 bits of the
# variance; a running mean lies closer.
_NEAR = 2.0


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

    def size(self, shape: tuple[int, ...]) -> int | Array:
        """Elements in a slice of an array of this shape, over all replicas."""
        number = math.prod(shape[a] for a in self.axes)
        if self.blocks is not None:
            axis, blocks = self.blocks
            number *= shape[axis] // blocks
        return number * self.replicas.size()

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
    if not reduction.centered:
        return _measure_about_zero(reduction, x, mask)
    if reduction.two_pass:
        return _measure_two_pass(reduction, x, mask)
    if guess is None or reduction.replicas.mapped:
        return _measure_twice(reduction, x, mask)
    guess = guess.astype(x.dtype)
    count, mean, square = _means(reduction, x, mask, origin=guess)
    var = jnp.maximum(square - abs_squared(mean), 0)
    near = jnp.abs(mean) <= _NEAR * jnp.sqrt(var)
    finite = square < _big(square.dtype)
    # A branch's operands are arrays in memory. Narrowed, this one is the array that is there
    # already (narrowing undoes the widening exactly, and the compiler drops both).
    narrow = x if reduction.stored is None else x.astype(reduction.stored)

    # Both branches must have one type, also where the guess is spread over more devices than x.
    zero = (mean == 0) & (guess == 0) & False

    def typed(measured: Measured) -> Measured:
        return jax.tree.map(lambda part: part + zero.astype(part.dtype), measured)

    def kept() -> Measured:
        return typed(Measured(_local(reduction, guess, mean, count, var), count, var))

    def again() -> Measured:
        return typed(_measure_twice(reduction, narrow.astype(x.dtype), mask))

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


def _measure_twice(reduction: Reduction, x, mask) -> Measured:
    """The moments about a first mean, for which a first read is taken about an element.

    Squares that overflow the first time are summed scaled down. Source: Blue, "A portable Fortran
    program to find the Euclidean norm of a vector", 1978.
    """
    element = _element(x, reduction, mask)
    _, offset, square = _means(reduction, x, mask, origin=element)
    real = square.dtype
    # The compiler computes the origin anew in each of its uses. They must round it alike: clipped,
    # the product that `offset` is cannot melt into a fused multiply-add in one and not in another.
    offset = _clipped(offset)
    # Where the mean is the element but for rounding, the element is as good an origin; and for a
    # slice of one repeated value it is that value, so that x - origin is exactly zero.
    blur = 4 * jnp.finfo(real).eps * (jnp.abs(element) + jnp.abs(offset))
    origin = jnp.where(jnp.abs(offset) > blur, element + offset, element)
    rescale = jnp.where(square < _big(real), 1, jnp.asarray(_rescale(real), real))
    scale = rescale.astype(x.dtype)
    wide = spread(scale, x)
    z = x * wide - spread(origin * scale, x)
    z = z if mask is None else jnp.where(mask, z, 0)
    count, mean, square = _sums(reduction, x.shape, mask, z, abs_squared(z))
    n = jnp.maximum(count, 1)
    mean = mean / n.astype(mean.dtype)
    var = jnp.maximum(square / n - abs_squared(mean), 0)
    mean = mean / scale
    # An element lies at most sqrt(n) deviations from the mean, any two 2 sqrt(n) from each other.
    # Where that could overflow, at the very end of the range, nothing is subtracted, and
    # 1 / sqrt(var) is zero.
    within = jnp.sqrt(var) < float(jnp.finfo(real).max) * rescale / (2 * jnp.sqrt(n))
    origin, mean = (jnp.where(within, part, jnp.zeros_like(part)) for part in (origin, mean))
    local = _local(reduction, origin, mean, jnp.where(within, count, 0), var, rescale)
    return Measured(local, count, saturate(var / rescale / rescale))


def _measure_about_zero(reduction: Reduction, x, mask) -> Measured:
    """Raw second moments of any finite data, in one read: squares summed at two scales."""
    real = jnp.finfo(x.dtype).dtype
    down = jnp.asarray(_rescale(real), real)
    z = x if mask is None else jnp.where(mask, x, 0)
    small = z * down.astype(x.dtype)
    count, *sums = _sums(reduction, x.shape, mask, abs_squared(z), abs_squared(small))
    square, small_square = (total / jnp.maximum(count, 1) for total in sums)
    fits = square < _big(real)
    rescale = jnp.where(fits, 1, down)
    var = jnp.where(fits, square, small_square)
    zero = jnp.zeros((1,) * x.ndim, x.dtype)
    local = _local(reduction, zero, zero, count, var, rescale)
    return Measured(local, count, saturate(var / rescale / rescale))


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
    reduction: Reduction, origin, mean, count, var, rescale: Array | float = 1.0
) -> LocalMoments:
    """Local moments from the variance of data that was scaled by `rescale`."""
    rstd = rescale * _reciprocal_root(var + reduction.epsilon * rescale * rescale)
    return LocalMoments(origin, mean, jnp.where(count > 0, rstd, 0))


def _reciprocal_root(x):
    """1 / sqrt(x), and 0 at 0: a slice without spread standardizes to zero, not to NaN."""
    zero = x == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, x)))


def _element(x, reduction: Reduction, mask):
    """A value inside the range of each slice, for one repeated value that value; 0 for none.

    The smallest: of a few elements where all count and they can be fetched for nothing.
    """
    # Of axis 0 all are read: a batch is spread over devices, and a few would have to travel.
    axes = tuple(a for a in reduction.axes if a > 0)
    if mask is None and _sliceable(x, axes):
        x = lax.slice(x, *_places(x.shape, axes))

    def smallest(part):
        infinity = jnp.asarray(jnp.inf, part.dtype)
        kept = part if mask is None else jnp.where(mask, part, infinity)
        found = reduction.replicas.min(reduction.over(jnp.min, kept))
        return found if mask is None else jnp.where(found == infinity, 0, found)

    if jnp.iscomplexobj(x):
        return lax.complex(smallest(jnp.real(x)), smallest(jnp.imag(x)))
    return smallest(x)


def _places(shape: tuple[int, ...], axes: tuple[int, ...]):
    """Start, end and stride of a grid of at most 16 places over the axes, away from the edges."""
    start, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    if not all(isinstance(shape[a], int) for a in axes):
        # A symbolic size (jax.export): all that is known is that there is a first place.
        return start, [1 if a in axes else n for a, n in enumerate(shape)], stride
    room = 16
    for left, a in zip(range(len(axes), 0, -1), sorted(axes, key=lambda a: shape[a])):
        number = min(shape[a], max(1, round(room ** (1 / left))))
        room //= number
        stride[a] = shape[a] // number
        span = stride[a] * (number - 1)
        start[a] = (shape[a] - 1 - span) // 2
        end[a] = start[a] + span + 1
    return start, end, stride


def _sliceable(x, axes: tuple[int, ...]) -> bool:
    """Whether none of the axes is, by the type of `x`, spread over an Explicit mesh."""
    spec = jax.typeof(x).sharding.spec
    return all(a >= len(spec) or spec[a] is None for a in axes)


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
