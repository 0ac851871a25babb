"""Standardize the slices of an array, with derivatives of any order in both modes.

Two functions with a rule each, so that the moments can be kept between the passes and xhat
recomputed. Both rules are made of xhat and rstd alone, which come from these same functions: so the
derivatives of the derivatives are right too, and none passes through a number of the size of x^2.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core import measure
from jaxnorm.core.blocks import spread
from jaxnorm.core.measure import LocalMoments, Measured, Reduction

# Of a forward pass only what bears this name is kept for the backward pass; see `core.affine`.
MOMENTS = "jaxnorm_moments"


def standardize(
    x: Inexact[Array, "*shape"],
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None = None,
    guess: Inexact[Array, "*#shape"] | None = None,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """xhat and the moments it was made with, differentiable to any order in both modes.

    Args:
        x: the data in the dtype that it is to be computed in, float32 at least.
        reduction: the axes and what lies behind them.
        mask: which elements count; None for all.
        guess: a value expected near the mean of each slice, the same on all replicas; None for
            one taken from the slice.
    """
    measured = jax.tree.map(_named, _measure(reduction, x, mask, guess))
    count = None if mask is None else measured.count  # else it is known without being kept
    return _standardize(reduction, x, mask, count, measured.local), measured


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(reduction: Reduction, x, mask, count, local: LocalMoments):
    del reduction, mask, count
    return local.standardize(x)


@_standardize.defjvp
def _standardize_jvp(reduction: Reduction, primals, tangents):
    """dxhat = rstd (dx - <dx> - xhat <Re(conj(xhat) dx)>), <.> the mean over a slice.

    The whole derivative, through the moments too, which are those of the same x: a linear map of
    dx, its own transpose where nothing is masked out.
    """
    x, mask, count, local = primals
    dx, *_ = tangents
    xhat = _standardize(reduction, x, mask, count, local)
    moments = (*_means_of_tangent(reduction, xhat, mask, count, dx), local.rstd)
    dmean, inner, rstd = (spread(m.astype(x.dtype), x) for m in moments)
    return xhat, (dx - dmean - xhat * inner) * rstd


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(reduction: Reduction, x, mask, guess) -> Measured:
    return measure.take(reduction, x, mask, guess)


@_measure.defjvp
def _measure_jvp(reduction: Reduction, primals, tangents):
    """d mean = <dx>, d rstd = -rstd^2 i and d var = 2 i / rstd with i = <Re(conj(xhat) dx)>."""
    x, mask, guess = primals
    dx, *_ = tangents
    measured = _measure(reduction, x, mask, guess)
    xhat = _standardize(reduction, x, mask, measured.count, measured.local)
    dmean, inner = _means_of_tangent(reduction, xhat, mask, measured.count, dx)
    rstd, zero = measured.local.rstd, jnp.zeros_like
    dvar = jnp.where(rstd > 0, inner + inner, 0) / jnp.where(rstd > 0, rstd, 1)
    local = LocalMoments(zero(measured.local.origin), dmean, -(inner * rstd) * rstd)
    return measured, Measured(local, zero(measured.count), dvar)


def _means_of_tangent(reduction: Reduction, xhat, mask, count, dx):
    """<dx>, zero for raw moments, and <Re(conj(xhat) dx)>, in one collective."""
    if mask is not None:
        xhat, dx = jnp.where(mask, xhat, 0), jnp.where(mask, dx, 0)
    product = jnp.real(jnp.conj(xhat) * dx) if jnp.iscomplexobj(xhat) else xhat * dx
    total = partial(reduction.over, jnp.sum)
    n = reduction.size(xhat.shape) if mask is None else jnp.maximum(count, 1)
    n = jnp.asarray(n, product.dtype)  # an int may be larger than an int32
    if not reduction.centered:
        (inner,) = reduction.replicas.sum(total(product))
        return jnp.zeros((1,) * dx.ndim, dx.dtype), inner / n
    first, inner = reduction.replicas.sum(total(dx), total(product))
    return first / n.astype(first.dtype), inner / n


def _named(array: Array) -> Array:
    # In parts: JAX cannot keep a complex array by name.
    if jnp.iscomplexobj(array):
        return lax.complex(_named(jnp.real(array)), _named(jnp.imag(array)))
    return checkpoint_name(array, MOMENTS)
