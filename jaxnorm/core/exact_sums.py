"""Moments of 16-bit numbers from one read, without a guess.

The square of such a number fits into a float32. Cut into two halves of as many bits as the number
has itself, it can be summed without rounding over thousands of elements, and so can the number.
What the subtraction in ``sum(x^2) - sum(x)^2 / n`` cancels is then exact, and what is left of it is
the variance to the last bits, at any offset that 16 bits can tell from zero spread.

A compiler can make such plain sums while it writes `x`; a second read about the mean it cannot.

Source of the error-free sum: Knuth, "The Art of Computer Programming", volume 2, section 4.2.2.
"""

import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def exact(dtype, size: int) -> bool:
    """True if sums over that many numbers of `dtype` are exact, if all are of one magnitude."""
    if dtype is None or jnp.dtype(dtype).itemsize != 2:
        return False
    return size <= 2 ** (23 - jnp.finfo(dtype).nmant)


def terms(x: Float[Array, "*shape"], dtype, size: int, down: float) -> tuple[Array, ...]:
    """Terms to be summed over each slice of `size` numbers that were widened from `dtype`.

    The numbers, divided by a power of two that keeps their sum in range; their squares in halves;
    and for bfloat16, whose squares can overflow, those of the numbers times `down`.
    """
    # The compiler may have left out that x was rounded to `dtype` before it was widened.
    x = _rounded(x, dtype)
    squares = [lax.square(x)]
    if _overflows(dtype):
        squares.append(lax.square(x * down))
    high = [_rounded(s, dtype) for s in squares]
    return x * share_of(size), *(part for s, h in zip(squares, high) for part in (h, s - h))


def solve(
    count: Array, sums: list[Array], dtype, size: int, down: float, big: float
) -> tuple[Array, Array, Array, Array]:
    """An origin, the mean of ``z - origin`` and the variance for ``z = x * rescale``; `rescale`."""
    total, *halves = sums
    rescale = jnp.ones_like(total)
    high, low = halves[:2]
    if _overflows(dtype):
        fits = high < big
        rescale = jnp.where(fits, rescale, down)
        high, low = (jnp.where(fits, a, b) for a, b in zip(halves[:2], halves[2:]))
    total = total * (rescale / share_of(size))
    n = jnp.maximum(count, 1)
    # A mean of as many bits as x has: n * origin, and what it is multiplied with below, are exact.
    origin = _rounded(total / n, dtype)
    rest = total - n * origin
    coarse = lax.reduce_precision(total, 8, 11)
    m2 = _sum_of(high, -origin * coarse, low, -origin * (total - coarse), -origin * rest)
    mean = rest / n
    var = jnp.maximum(m2 / n - lax.square(mean), 0)
    return origin, mean, var, rescale


def _sum_of(first: Array, *others: Array) -> Array:
    """A sum of numbers that nearly cancel, rounded about once."""
    error = jnp.zeros_like(first)
    for other in others:
        total = first + other
        part = total - first
        error = error + ((first - (total - part)) + (other - part))
        first = total
    return first + error


def _rounded(x: Array, dtype) -> Array:
    """To as many bits as `dtype` has, in the range of float32."""
    return lax.reduce_precision(x, 8, jnp.finfo(dtype).nmant)


def _overflows(dtype) -> bool:
    return jnp.finfo(dtype).nexp == 8


def share_of(size: int) -> float:
    """A power of two near ``1 / size``, by which no sum of `size` numbers leaves the range."""
    return 2.0 ** -math.ceil(math.log2(size))
