"""The normalized array from moments: standardize, finish, and what the backward pass keeps."""

from dataclasses import replace
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.blocks import placed_like
from jaxnorm.core.finish import Finish
from jaxnorm.core.measure import take
from jaxnorm.core.moments import wide_dtype
from jaxnorm.core.slices import LocalMoments, Measured, Reduction
from jaxnorm.core.standardize import MOMENTS, push, standardize

# Between the passes `x` is kept in its own dtype, and the moments, which bear this name. All else
# is recomputed, in the wide dtype, and the gradient rounded once.
_kept = partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(MOMENTS),
)


def normalize(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None = None,
    finish: Finish,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """``finish((x - mean) * rstd, scale, bias)`` with the moments of `x`, and those moments.

    Computed in float32 at least and rounded once.
    """
    if reduction.replicas.mapped:
        run = _normalized
    else:
        run = _normalize if finish.is_constant else _remembering
    return run(reduction, finish, x, scale, bias, mask, guess)


def _normalized(reduction: Reduction, finish: Finish, x, scale, bias, mask, guess):
    y, measured = standardized(reduction, x, mask, guess, *finish.parameters(x, scale, bias))
    return finish.rounded(y), measured


def normalize_held(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    finish: Finish,
) -> Inexact[Array, "*shape"]:
    """Normalize a block in fast memory, where nothing is kept and all may be read again."""
    _, _, local = _held(reduction, x, mask)
    return finish(local.standardize(x), scale, bias)


def pull_back_held(
    x: Inexact[Array, "*shape"],
    dy: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    reduction: Reduction,
    mask: Bool[Array, "*#shape"] | None,
    finish: Finish,
):
    """Cotangents of `x`, scale and bias, not rounded, from that of `normalize_held`'s result."""
    wide, measured, local = _held(reduction, x, mask)
    given = [p if p is None else p.astype(wide_dtype(p.dtype)) for p in (scale, bias)]
    _, pull = jax.vjp(finish, local.standardize(wide), *given)
    dxhat, *dgiven = pull(dy)
    count = None if mask is None else measured.count
    # The map of tangents is its own transpose.
    return push(reduction, wide, mask, count, measured.local, dxhat), *dgiven


def _held(reduction: Reduction, x, mask):
    """The block widened, its moments, and these as they apply to each of its entries."""
    wide = x.astype(wide_dtype(x.dtype))
    measured = take(reduction, wide, mask, None)
    return wide, measured, measured.local.over(reduction, wide)


def _remembering(reduction: Reduction, finish: Finish, *arrays):
    return _kept(partial(_normalized, reduction, finish))(*arrays)


# Compiled once for each shape where it is called outside of `jit`; inside, it dissolves.
_normalize = jax.jit(_remembering, static_argnums=(0, 1), inline=True)


def measure(
    x: Inexact[Array, "*shape"], reduction: Reduction, mask: Bool[Array, "*#shape"] | None
) -> Measured:
    """The moments alone, without a normalized array."""
    run = _measured if reduction.replicas.mapped else _measure
    return run(reduction, x, mask)


def _measured(reduction: Reduction, x, mask) -> Measured:
    return standardized(reduction, x, mask, None)[1]


@partial(jax.jit, static_argnums=0, inline=True)
def _measure(reduction: Reduction, x, mask) -> Measured:
    return _kept(partial(_measured, reduction))(x, mask)


def standardized(reduction: Reduction, x, mask, guess, factor=None, shift=None):
    """xhat * factor + shift and the moments, from `x` widened; see `jaxnorm.core.standardize`."""
    wide = x.astype(wide_dtype(x.dtype))
    if any(jax.typeof(x).sharding.spec):
        # On an Explicit mesh what is chosen and what chooses must have one layout; and a product
        # of what is not spread is not spread either, though it may be as large as x.
        mask = None if mask is None else placed_like(jnp.broadcast_to(mask, x.shape), x)
        factor, shift = (None if p is None else placed_like(p, x) for p in (factor, shift))
    reduction = replace(reduction, stored=x.dtype)
    return standardize(wide, reduction, mask, guess, factor, shift)


def normalize_with(
    x: Inexact[Array, "*shape"],
    local: LocalMoments,
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    finish: Finish,
) -> Inexact[Array, "*shape"]:
    """Normalize with moments that are given."""
    run = _normalize_with if finish.is_constant else _remembering_with
    return run(finish, x, local, scale, bias)


def _remembering_with(finish: Finish, x, local, scale, bias):
    @_kept
    def run(x, local: LocalMoments, scale, bias):
        return finish(local.standardize(x), scale, bias)

    return run(x, local, scale, bias)


_normalize_with = jax.jit(_remembering_with, static_argnums=0, inline=True)


@overload
def along(parameter: None, feature_axes: tuple[int, ...], ndim: int) -> None: ...
@overload
def along(parameter: Array, feature_axes: tuple[int, ...], ndim: int) -> Array: ...
def along(parameter, feature_axes, ndim):
    """A parameter of the feature axes' shape, with size 1 on all other axes of a rank `ndim`.

    One of rank `ndim` is given for each sample (or whatever its other sizes say), and fits already.
    """
    if parameter is None or parameter.ndim == ndim:
        return parameter
    sizes = dict(zip(feature_axes, parameter.shape, strict=True))
    return parameter.reshape([sizes.get(a, 1) for a in range(ndim)])
