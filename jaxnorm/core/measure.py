"""Measure the slices of an array: one read, any offset.

`LocalMoments` is what normalization needs: moments seen from a value near the data, because a
mean rounded to float32 is off by 1e-3 at an offset of 1e4, and so would be everything that is
normalized with it.

``z = x - guess`` and one read of ``x`` give ``mean(z)`` and ``mean(|z|^2) - |mean(z)|^2``. The
subtraction in that formula costs about ``log2(1 + |mean(z)|^2 / var)`` bits, so it is exact enough
whenever the guess lies within a few deviations of the mean. A guess is cheap: the running mean in
batch normalization, elsewhere an element of the slice. When it turns out to be a poor one
(the first steps of training, an outlier), the moments are taken again from a good one: see
`_measure_again`. Nothing depends on the guess but the time it takes.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm.core.moments import Moments, abs_squared, saturate
from jaxnorm.core.replicas import ALONE, Alone

# A guess within this many deviations of the mean costs at most log2(1 + 2**2) = 2.3 bits of the
# variance. Looser is cheaper for tiny batches only: the samples of `_sample` lie within half a
# deviation, a running mean closer still.
_NEAR = 2.0


class LocalMoments(NamedTuple):
    """What it takes to standardize `x`, kept with size 1 on the reduced axes.

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
        return ((x.astype(dtype) - self.origin) - self.mean) * self.rstd.astype(dtype)

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
    stored: jax.typing.DTypeLike | None = None
    """What `x` was widened from, if it was: the branch of a poor guess reads it in that form."""

    def size(self, shape: tuple[int, ...]) -> int:
        """Elements in a slice of an array of this shape, over all replicas."""
        return math.prod(shape[a] for a in self.axes) * self.replicas.size()


def take(
    reduction: Reduction,
    x: Inexact[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None,
) -> Measured:
    """The moments of the slices of `x`, from a guess of their means; None: from one of its own."""
    if not reduction.centered:
        zero = jnp.zeros((1,) * x.ndim, x.dtype)
        return _measure_at_two_scales(reduction, x, mask, zero)
    if reduction.two_pass:
        return _measure_two_pass(reduction, x, mask)
    guess = _sample(x, reduction, mask) if guess is None else guess.astype(x.dtype)
    count, mean, square = _means(reduction, x, mask, origin=guess)
    var = jnp.maximum(square - abs_squared(mean), 0)
    near = jnp.abs(mean) <= _NEAR * jnp.sqrt(var)
    finite = square < _big(square.dtype)

    def kept() -> Measured:
        origin = guess + jnp.zeros_like(mean)
        return Measured(_local(reduction, origin, mean, count, var), count, var)

    # A branch's operands are arrays in memory. Narrowed, this one is the array that is there
    # already (narrowing undoes the widening exactly, and the compiler drops both).
    narrow = x if reduction.stored is None else x.astype(reduction.stored)
    return lax.cond(
        _all(near & finite), kept, lambda: _measure_again(reduction, narrow, mask, guess, mean)
    )


def _sums(reduction: Reduction, shape, mask, *terms):
    """Count of each slice and sums of terms that are zero outside the mask, in one collective."""
    total = partial(jnp.sum, axis=reduction.axes, keepdims=True)
    if mask is None:
        sums = reduction.replicas.sum(*map(total, terms))
        return jnp.full_like(sums[-1], reduction.size(shape)), *sums
    inside = jnp.broadcast_to(mask, shape).astype(terms[-1].dtype)
    return reduction.replicas.sum(total(inside), *map(total, terms))


def _means(reduction: Reduction, x, mask, *, origin):
    """Count, mean(z) and mean(|z|^2) for z = x - origin, in one read of x."""
    z = x - origin
    z = z if mask is None else jnp.where(mask, z, 0)
    count, first, square = _sums(reduction, x.shape, mask, z, abs_squared(z))
    n = jnp.maximum(count, 1)
    return count, first / n.astype(first.dtype), square / n


def _measure_again(reduction: Reduction, x, mask, guess, offset) -> Measured:
    """The same moments in a second read, from a first mean, guess + offset, of any quality.

    That mean is off by the rounding of numbers as large as the guess was wrong, `blur`. Where an
    element of the slice lies that close to it, the element is as good an origin; and for a slice
    of one repeated value it is that value, so that x - origin is exactly zero. Sums are taken at
    two scales, since a poor guess may also be one that overflowed.
    """
    x = x.astype(guess.dtype)
    element = _element(x, reduction, mask)
    mean = guess + offset
    blur = 4 * jnp.finfo(mean.dtype).eps * (jnp.abs(guess) + jnp.abs(offset))
    # Written so that a mean or a blur that is not a number chooses the element.
    origin = jnp.where(jnp.abs(mean - element) > blur, mean, element)
    return _measure_at_two_scales(reduction, x, mask, origin)


def _measure_at_two_scales(reduction: Reduction, x, mask, origin) -> Measured:
    """Moments about `origin` for any finite data: squares that overflow are summed scaled down.

    Source: Blue, "A portable Fortran program to find the Euclidean norm of a vector", 1978.
    """
    real = jnp.finfo(origin.dtype).dtype
    down = jnp.asarray(_rescale(real), real)
    inside = (lambda z: z) if mask is None else (lambda z: jnp.where(mask, z, 0))
    plain = inside(x - origin)
    small = inside(x * down.astype(x.dtype) - origin * down.astype(x.dtype))
    terms = (abs_squared(plain), abs_squared(small))
    if reduction.centered:
        terms = (plain, small, *terms)
    count, *means = _sums(reduction, x.shape, mask, *terms)
    n = jnp.maximum(count, 1)
    square, small_square = (total / n for total in means[-2:])
    fits = square < _big(real)
    rescale = jnp.where(fits, jnp.ones_like(square), down)
    var = jnp.where(fits, square, small_square)
    mean, count_within = jnp.zeros_like(origin), count
    if reduction.centered:
        scale = rescale.astype(x.dtype)
        mean = jnp.where(fits, means[0], means[1]) / n.astype(x.dtype)
        var = jnp.maximum(var - abs_squared(mean), 0)
        # The origin moves to the mean: among the largest numbers the way between may overflow.
        origin, mean = (part / scale for part in _two_sum(origin * scale, mean))
        # An element lies at most sqrt(n) deviations from the mean. Where that could overflow, at
        # the very end of the range, nothing is subtracted, and 1 / sqrt(var) is zero.
        limit = float(jnp.finfo(real).max) * rescale / (2 * jnp.sqrt(n))
        within = jnp.sqrt(var) < limit
        origin, mean = (jnp.where(within, part, jnp.zeros_like(part)) for part in (origin, mean))
        count_within = jnp.where(within, count, 0)
    local = _local(reduction, origin, mean, count_within, var, rescale)
    return Measured(local, count, saturate(var / rescale / rescale))


def _two_sum(a, b):
    """a + b rounded, and what the rounding lost (Knuth, TAOCP volume 2, section 4.2.2)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _measure_two_pass(reduction: Reduction, x, mask) -> Measured:
    """mean(x), rounded, then mean(|x - mean|^2): what Flax does with use_fast_variance=False.

    Kept for reproducing numbers, not for its digits: at an offset of 1e4 deviations the rounding
    of the mean alone moves every float32 result by 1e-3.
    """
    if reduction.replicas == ALONE:
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


def _sample(x, reduction: Reduction, mask):
    """A guess of the mean of each slice, for next to nothing: the mean of a few elements."""
    if not _at_hand(x, reduction):
        # Fetching an element for all would be a collective of its own.
        shape = [1 if a in reduction.axes else n for a, n in enumerate(x.shape)]
        return jnp.zeros(shape, x.dtype)
    if mask is None:
        return _few(x, reduction)
    # Which elements count is known to the device only: this guess takes a read of x.
    low = _element(x, reduction, mask)
    _, offset, _ = _means(reduction, x, mask, origin=low)
    return low + offset


def _few(x, reduction: Reduction):
    """Mean of at most 16 elements, clipped to their range: exact for one repeated value."""
    few = lax.slice(x, *_places(x.shape, reduction.axes))
    over = {"axis": reduction.axes, "keepdims": True}
    mean = jnp.mean(few, **over)
    return _componentwise(
        lambda mean, few: jnp.clip(mean, jnp.min(few, **over), jnp.max(few, **over)), mean, few
    )


def _element(x, reduction: Reduction, mask):
    """A value inside the range of each slice, for one repeated value that value; 0 for none."""
    if mask is None and _at_hand(x, reduction):
        return _few(x, reduction)

    def smallest(part):
        infinity = jnp.asarray(jnp.inf, part.dtype)
        kept = part if mask is None else jnp.where(mask, part, infinity)
        found = reduction.replicas.min(jnp.min(kept, axis=reduction.axes, keepdims=True))
        return jnp.where(found == infinity, 0, found)

    return _componentwise(smallest, x)


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


def _at_hand(x, reduction: Reduction) -> bool:
    """Whether slices lie whole here: not over replicas, nor, by the type of `x`, over a mesh."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    spread = any(a < len(spec) and spec[a] is not None for a in reduction.axes)
    return reduction.replicas == ALONE and not spread


@custom_vmap
def _all(condition) -> Bool[Array, ""]:
    return jnp.all(condition)


@_all.def_vmap
def _all_vmap(axis_size, in_batched, condition):
    # One answer for the whole batch: both branches are right for every member, and an unbatched
    # predicate keeps `cond` a branch where `vmap` would otherwise compute both.
    del axis_size, in_batched
    return _all(condition), False


def _componentwise(function, *parts):
    if not jnp.iscomplexobj(parts[0]):
        return function(*parts)
    real, imag = map(jnp.real, parts), map(jnp.imag, parts)
    return lax.complex(function(*real), function(*imag))


def _big(dtype) -> float:
    """A mean square below this has not overflowed while it was summed."""
    return 2.0 ** (jnp.finfo(dtype).maxexp * 25 // 32)


def _rescale(dtype) -> float:
    """A power of two that brings the largest number of `dtype` safely below sqrt(_big)."""
    return 2.0 ** -(jnp.finfo(dtype).maxexp * 5 // 8)
