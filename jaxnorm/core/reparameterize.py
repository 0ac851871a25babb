"""Kernels divided by their lengths (weight norm) or by a singular value (spectral norm).

Both work on scaled numbers, so that no square overflows or vanishes, and in float32 at least.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jaxnorm.core.moments import promoted, wide_dtype


def weight_norm(
    kernel: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None,
    *,
    features: tuple[int, ...],
    epsilon: float,
) -> Inexact[Array, "*shape"]:
    """Weight normalization ``scale * v / sqrt(sum(|v|^2) + epsilon)`` of each feature's slice v.

    `scale` has the shape of the axes `features`, in ascending order; None for 1. The result is in
    float32 at least.
    """
    reduced = tuple(a for a in range(kernel.ndim) if a not in features)
    dtype = wide_dtype(kernel.dtype if scale is None else promoted(kernel, scale))
    direction = _unit(kernel.astype(dtype), reduced, epsilon)
    return direction if scale is None else direction * jnp.expand_dims(scale, reduced).astype(dtype)


def spectral_norm(
    kernel: Inexact[Array, "*shape"], u: Inexact[Array, "1 out"], *, steps: int, epsilon: float
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "1 out"], Float[Array, ""]]:
    """Spectral normalization ``W / sigma``, and the next `u` and `sigma`, without gradient.

    W is `kernel` as a matrix from all its axes but the last to the last, and `sigma` its largest
    singular value as `steps` of power iteration from `u` find it, at most the true one. `u` and
    its counterpart v are constants of the derivative; ``sigma = v W u*`` is not. All results are
    in float32 at least.

    Where W sends `u` to zero, the next `u` and `sigma` are zero and W stays as it is, then and from
    then on. So it is with parameters that start at zero, for which the quotient would jump from 0
    to norm 1 with their first update.
    """
    dtype = wide_dtype(promoted(kernel, u))
    matrix = kernel.reshape(-1, kernel.shape[-1]).astype(dtype)
    # The quotient depends on no scale: this way kernels of any size are normalized.
    size = _size(matrix, (0, 1), 0.0)
    scaled = matrix / size.astype(dtype)
    v, u = _singular_vectors(lax.stop_gradient(scaled), u.astype(dtype), steps, epsilon)
    sigma = jnp.real(_product(_product(v, scaled), jnp.conj(u.T)))
    quotient = scaled / jnp.where(sigma > 0, sigma, 1).astype(dtype)
    normalized = jnp.where(sigma > 0, quotient, matrix)
    return normalized.reshape(kernel.shape), u, lax.stop_gradient(sigma * size)[0, 0]


def _singular_vectors(matrix, u, steps: int, epsilon: float):
    """Vectors v and `u` of the largest singular value, as power iteration from `u` finds them."""
    v = u
    for _ in range(steps):
        v = _unit(_product(u, jnp.conj(matrix.T)), (0, 1), epsilon)
        u = _unit(_product(v, matrix), (0, 1), epsilon)
    return lax.stop_gradient((v, u))


def _unit(x, axes: tuple[int, ...], epsilon: float):
    """Slices of `x` over `axes`, each divided by ``sqrt(sum(|x|^2) + epsilon)``."""
    size = _size(x, axes, epsilon)
    scaled = x / size.astype(x.dtype)
    squares = sum(jnp.sum(jnp.square(part), axes, keepdims=True) for part in _parts(scaled))
    total = squares + jnp.square(jnp.asarray(epsilon**0.5, size.dtype) / size)
    return scaled * lax.rsqrt(jnp.where(total > 0, total, 1)).astype(x.dtype)


def _size(x, axes: tuple[int, ...], epsilon: float):
    """The largest number of each slice of `x` over `axes`, to scale it by; without gradient.

    At least the root of `epsilon`, so that dividing this does not overflow; 1 for zeros.
    """
    # Of nothing -1: a maximum with 0 is what monitors know a relu by.
    found = [jnp.max(jnp.abs(part), axes, keepdims=True, initial=-1.0) for part in _parts(x)]
    largest = functools.reduce(jnp.maximum, found)
    least = max(epsilon**0.5, float(jnp.finfo(x.dtype).tiny))
    small = jnp.where(largest > 0, least, 1).astype(largest.dtype)
    return lax.stop_gradient(jnp.where(largest > least, largest, small))


def _parts(x) -> tuple:
    """Real and imaginary part of a complex array; a real one as it is."""
    return (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)


def _product(a, b):
    """Matrix product in full precision; the default of accelerators costs `sigma` three digits."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
