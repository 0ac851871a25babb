"""Slices of an array, and the moments that are measured of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxnorm.core.blocks import fold, settled, spread
from jaxnorm.core.moments import Moments, saturate
from jaxnorm.core.replicas import ALONE, Alone

# Elements of an array from which on more is compiled to make it faster; see `Reduction.worth_it`.
LARGE = 2**18


class LocalMoments(NamedTuple):
    """All that standardizes `x`, with size 1 (or the number of blocks) on reduced axes.

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
        """These moments with size 1 or that of `x` on all axes: those of blocks, for each entry."""
        return LocalMoments(*(self.spread(reduction, part, x) for part in self))

    def spread(self, reduction: "Reduction", part: Inexact[Array, "*slices"], x) -> Array:
        """Values that belong to blocks of an axis, repeated for each of its entries."""
        wide = spread(part, x)
        if wide.shape == part.shape or not reduction.worth_it(x):
            return wide
        return settled(wide, spread(self.rstd, x))

    @classmethod
    def known(cls, mean: Inexact[Array, "*slices"], var: Float[Array, "*slices"], epsilon: float):
        """Local moments from statistics that are given, as in evaluation."""
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
    """The textbook's way, with a rounded mean; see `measure._two_pass`."""
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
        """True if normalizing `x` takes long enough to compile what makes it faster.

        That is for one device, or one that does not know of others.
        """
        # A symbolic size (jax.export) may be anything.
        large = all(isinstance(n, int) for n in x.shape) and x.size >= LARGE
        return large and not self.at_hand and jax.typeof(x).sharding.mesh.empty

    def over(self, reducer: Callable, array: Array) -> Array:
        """Apply jnp.sum, jnp.min or their like to each slice, without the replicas."""
        reduced = reducer(array, axis=self.axes, keepdims=True)
        return reduced if self.blocks is None else fold(reducer, reduced, *self.blocks)


def _reciprocal_root(x):
    """1 / sqrt(x), and 0 at 0: a slice without spread standardizes to zero, not to NaN."""
    zero = x == 0
    return jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, x)))
