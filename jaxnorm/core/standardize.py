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
from jaxnorm.core.blocks import fold, settled, spread
from jaxnorm.core.finish import affine
from jaxnorm.core.slices import LocalMoments, Measured, Reduction

# Of a forward pass only what bears this name is kept for the backward pass; see `core.affine`.
MOMENTS = "jaxnorm_moments"


def standardize(
    x: Inexact[Array, "*shape"],
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None = None,
    guess: Inexact[Array, "*#shape"] | None = None,
    factor: Inexact[Array, "*#shape"] | None = None,
    shift: Inexact[Array, "*#shape"] | None = None,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """xhat * factor + shift and the moments, differentiable to any order in both modes.

    Args:
        x: the data in the dtype that it is to be computed in, float32 at least.
        reduction: the axes and what lies behind them.
        mask: which elements count; None for all.
        guess: a value expected near the mean of each slice, the same on all replicas; None for
            one taken from the slice.
        factor: None for 1; as wide as `x` at least.
        shift: None for 0; of the dtype of `factor`.
    """
    measured = _measure(reduction, x, mask, guess)
    if not reduction.at_hand:  # a kernel keeps nothing
        measured = jax.tree.map(_named, measured)
    count = None if mask is None else measured.count  # else it is known without being kept
    return _standardize(reduction, x, mask, count, measured.local, factor, shift), measured


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _standardize(reduction: Reduction, x, mask, count, local: LocalMoments, factor, shift):
    del mask, count
    return affine(local.over(reduction, x).standardize(x), factor, shift)


@_standardize.defjvp
def _standardize_jvp(reduction: Reduction, primals, tangents):
    """dxhat = rstd (dx - <dx> - xhat <Re(conj(xhat) dx)>), <.> the mean over a slice.

    The whole derivative, through the moments too, which are those of the same x: a linear map of
    dx, its own transpose where nothing is masked out.

    With y = f xhat + s it is written as ``dy = f rstd dx + xhat b + c``, b = df - f rstd <xhat dx>
    and c = ds - f rstd <dx>, so that its transpose sums dy and xhat dy and nothing else: all that
    the gradients with respect to x, f and s need of them.
    """
    x, mask, count, local, factor, shift = primals
    dx, _, _, _, dfactor, dshift = tangents
    xhat = _standardize(reduction, x, mask, count, local, None, None)
    y = affine(xhat, factor, shift)
    dmean, inner = means_of_tangent(reduction, xhat, mask, count, dx, local.rstd)
    rstd = local.spread(reduction, local.rstd, x).astype(x.dtype)
    inner = local.spread(reduction, inner.astype(x.dtype), x)
    slope = _times(reduction, inner * -rstd, factor, x)
    slope = slope if factor is None else slope + dfactor
    if reduction.worth_it(x):
        # Where rstd is zero so is xhat. It makes an array of what is summed, which CPUs need to be
        # fast, and keeps the product with xhat from being computed for each sum anew.
        live = jnp.broadcast_to(rstd != 0, x.shape)
        slope = jnp.where(live, slope, jnp.zeros_like(slope))
    dy = (dx * rstd).astype(y.dtype)
    dy = dy if factor is None else dy * factor
    dy = dy + xhat.astype(y.dtype) * slope.astype(y.dtype)
    if reduction.centered:
        dmean = local.spread(reduction, dmean, x)
        dy = dy + _times(reduction, dmean * -rstd, factor, x).astype(y.dtype)
    return y, dy if shift is None else dy + dshift


def push(reduction: Reduction, x, mask, count, local: LocalMoments, dx):
    """The tangent of xhat from that of `x`, with moments that are known."""
    tangents = (dx, None, None, None, None, None)
    return _standardize_jvp(reduction, (x, mask, count, local, None, None), tangents)[1]


def _times(reduction: Reduction, per_slice, factor, x):
    """The product of what there is one of for each slice with the factor.

    Where all of the one meets all of the other it is a product of matrices, which its transpose is
    too: on CPUs a slice of an array is so weighted and summed in one go.
    """
    if factor is None:
        return per_slice
    per_slice = per_slice.astype(factor.dtype)
    first = min(reduction.axes, default=0)
    ones = [1] * x.ndim
    rows, columns = x.shape[:first], x.shape[first:]
    outer = (*rows, *ones[first:]), (*ones[:first], *columns)
    if not reduction.worth_it(x) or (per_slice.shape, factor.shape) != outer:
        return per_slice * factor

    def product(per_slice, factor):
        return lax.dot_general(
            per_slice.reshape(rows),
            factor.reshape(columns),
            (((), ()), ((), ())),
            precision=lax.Precision.HIGHEST,
        )

    return lax.platform_dependent(per_slice, factor, cpu=product, default=jnp.multiply)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(reduction: Reduction, x, mask, guess) -> Measured:
    return measure.take(reduction, x, mask, guess)


@_measure.defjvp
def _measure_jvp(reduction: Reduction, primals, tangents):
    """d mean = <dx>, d rstd = -rstd^2 i and d var = 2 i / rstd with i = <Re(conj(xhat) dx)>."""
    x, mask, guess = primals
    dx, *_ = tangents
    measured = _measure(reduction, x, mask, guess)
    xhat = _standardize(reduction, x, mask, measured.count, measured.local, None, None)
    dmean, inner = means_of_tangent(reduction, xhat, mask, measured.count, dx)
    rstd, zero = measured.local.rstd, jnp.zeros_like
    dvar = jnp.where(rstd > 0, inner + inner, 0) / jnp.where(rstd > 0, rstd, 1)
    local = LocalMoments(zero(measured.local.origin), dmean, -(inner * rstd) * rstd)
    return measured, Measured(local, zero(measured.count), dvar)


def means_of_tangent(reduction: Reduction, xhat, mask, count, dx, rstd=None):
    """<dx>, zero for raw moments, and <Re(conj(xhat) dx)>, in one collective."""
    if mask is not None:
        xhat, dx = jnp.where(mask, xhat, 0), jnp.where(mask, dx, 0)
    product = jnp.real(jnp.conj(xhat) * dx) if jnp.iscomplexobj(xhat) else xhat * dx

    def total(array):
        if rstd is None or reduction.blocks is None or not reduction.worth_it(dx):
            return reduction.over(jnp.sum, array)
        sums = jnp.sum(array, axis=reduction.axes, keepdims=True)
        return fold(jnp.sum, settled(sums, spread(rstd, sums)), *reduction.blocks)

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
