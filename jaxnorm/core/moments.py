"""The monoid of moments, and the few dtype rules that every statistic follows.

The same object serves a masked batch, shards of a mesh, micro-batches of an accumulated step and
a data set read in chunks: each is a `Moments`, and `Moments.merge` puts them together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax
from jaxtyping import Array, Float, Inexact


class Moments(NamedTuple):
    """Count, mean and summed squared deviation of a set of numbers: a commutative monoid.

    Attributes:
        count: number of elements; float32 at least, so that it merges without casts.
        mean: their mean; complex for complex numbers, 0 where there is no element.
        m2: sum of |x - mean|^2; saturates at the largest finite number.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> left = jaxnorm.moments(jnp.array([1.0, 2.0]), 0)
        >>> right = jaxnorm.moments(jnp.array([3.0, 6.0]), 0)
        >>> whole = left.merge(right)
        >>> whole.count.item(), whole.mean.item(), whole.m2.item(), whole.var.item()
        (4.0, 3.0, 14.0, 3.5)
    """

    # float32, or float64 for such data; the mean complex64 or complex128 for complex data
    count: Float[Array, "*slices"]  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Inexact[Array, "*slices"]
    m2: Float[Array, "*slices"]

    @property
    def var(self) -> Float[Array, "*slices"]:
        """Biased variance m2 / count; 0 where there is no element."""
        return self.m2 / jnp.maximum(self.count, 1)

    def merge(self, other: "Moments") -> "Moments":
        """Moments of the union of two sets.

        ``mean = mean_a + (mean_b - mean_a) n_b / n`` and
        ``m2 = m2_a + m2_b + |mean_b - mean_a|^2 n_a n_b / n``.

        Args:
            other: moments of the other set, of a shape that broadcasts with this one.

        Returns:
            Moments of both. Merging with `Moments.empty` changes nothing.

        Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing
        sample variances", 1979, equation (2.1).
        """
        count = self.count + other.count
        # From the larger part, and in halves: so neither product leaves the range of the dtype.
        first = self.count >= other.count
        large, small = (
            jnp.where(first, self.mean, other.mean),
            jnp.where(first, other.mean, self.mean),
        )
        share = jnp.minimum(self.count, other.count) / jnp.maximum(count, 1)
        half = small * 0.5 - large * 0.5
        mean = large + half * (2 * share).astype(half.dtype)
        weight = jnp.sqrt(jnp.maximum(self.count, other.count) * share)
        between = abs_squared(half * (2 * weight).astype(half.dtype))
        return Moments(count, mean, saturate(self.m2 + other.m2 + between))

    def pooled(self) -> "Moments":
        """Moments of the union of all the sets that the leading axis goes over.

        ``mean = sum_i n_i mean_i / n`` and ``m2 = sum_i m2_i + n_i |mean_i - mean|^2``, the means
        taken from the first one's on.

        Returns:
            Moments of the shape that is left without that axis.

        Example:
            >>> import jax.numpy as jnp, jaxnorm
            >>> parts = jaxnorm.moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]), 1)
            >>> whole = parts.pooled()
            >>> whole.mean.item(), whole.m2.item()
            (3.0, 14.0)
        """
        count = self.count.sum(0)
        weight = (self.count / jnp.maximum(count, 1)).astype(self.mean.dtype)
        origin = jnp.where(self.count[0] > 0, self.mean[0], self.mean.max(0))
        mean = (weight * (self.mean - origin)).sum(0)
        deviation = self.mean - origin - mean
        m2 = self.m2 + self.count * abs_squared(deviation)
        return Moments(count, origin + mean, saturate(m2.sum(0)))

    @classmethod
    def empty(cls, shape: tuple[int, ...] = (), dtype: jax.typing.DTypeLike = jnp.float32):
        """The identity of `merge`: no element at all.

        Args:
            shape: shape of the slices.
            dtype: dtype of the mean; count and m2 take its real part's.

        Example:
            >>> from jaxnorm import Moments
            >>> Moments.empty().merge(Moments.empty()).count.item()
            0.0
        """
        real = jnp.zeros(shape, jnp.finfo(dtype).dtype)
        return cls(real, jnp.zeros(shape, dtype), real)


# An exported program that takes or returns moments can be written to a file.
export.register_namedtuple_serialization(Moments, serialized_name="jaxnorm.Moments")


class LocalMoments(NamedTuple):
    """All that standardizes `x`: one entry for each slice, of the rank of `x`.

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
        """Local moments from statistics that are given, as in evaluation."""
        var = var + epsilon
        zero = var == 0  # a slice without deviation standardizes to zero, not to NaN
        rstd = jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, var)))
        return cls(mean, jnp.zeros_like(mean), rstd)


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


def abs_squared(x: Inexact[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The squared modulus ``|x|^2`` as real numbers."""
    if jnp.iscomplexobj(x):
        return lax.square(jnp.real(x)) + lax.square(jnp.imag(x))
    return lax.square(x)


def promoted(*dtypes):
    """The dtype that JAX's standard promotion gives, whichever rules the user has chosen.

    Here promotion is meant, and every cast that follows from it is spelled out.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def wide_dtype(dtype: jax.typing.DTypeLike):
    """The dtype in which statistics of `dtype` are accumulated: float32 at least."""
    return promoted(dtype, jnp.float32)


def saturate(x: Inexact[Array, "*shape"], dtype: jax.typing.DTypeLike | None = None):
    """Cast real numbers without turning a large one into infinity; complex ones as they are."""
    dtype = x.dtype if dtype is None else dtype
    if jnp.iscomplexobj(x):
        return x.astype(dtype)
    limit = min(float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max))
    return lax.clamp(jnp.asarray(-limit, x.dtype), x, jnp.asarray(limit, x.dtype)).astype(dtype)
