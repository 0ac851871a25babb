"""From moments to the normalized array: standardize, scale, shift, and what the backward keeps."""

from dataclasses import replace
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core.blocks import placed_like
from jaxnorm.core.measure import LocalMoments, Measured, Reduction
from jaxnorm.core.moments import promoted, wide_dtype
from jaxnorm.core.standardize import MOMENTS, standardize

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
    dtype: jax.typing.DTypeLike,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """``(x - mean) * rstd * scale + bias`` with the moments of `x`, and those moments.

    Computed in float32 at least and rounded once to `dtype`.
    """

    run = _normalized if reduction.replicas.mapped else _normalize
    return run(reduction, jnp.dtype(dtype), x, scale, bias, mask, guess)


def _normalized(reduction: Reduction, dtype, x, scale, bias, mask, guess):
    xhat, measured = _standardized(reduction, x, mask, guess)
    return _affine(xhat, scale, bias, dtype), measured


# Compiled once for each shape where it is called outside of `jit`; inside, it dissolves.
@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _normalize(reduction: Reduction, dtype, *arrays):
    return _kept(partial(_normalized, reduction, dtype))(*arrays)


def measure(
    x: Inexact[Array, "*shape"], reduction: Reduction, mask: Bool[Array, "*#shape"] | None
) -> Measured:
    """The moments alone."""
    run = _measured if reduction.replicas.mapped else _measure
    return run(reduction, x, mask)


def _measured(reduction: Reduction, x, mask) -> Measured:
    return _standardized(reduction, x, mask, None)[1]


@partial(jax.jit, static_argnums=0, inline=True)
def _measure(reduction: Reduction, x, mask) -> Measured:
    return _kept(partial(_measured, reduction))(x, mask)


def _standardized(reduction: Reduction, x, mask, guess):
    wide = x.astype(wide_dtype(x.dtype))
    if mask is not None and any(jax.typeof(x).sharding.spec):
        # On an Explicit mesh what is chosen and what chooses must have one layout.
        mask = placed_like(jnp.broadcast_to(mask, x.shape), x)
    return standardize(wide, replace(reduction, stored=x.dtype), mask, guess)


def normalize_with(
    x: Inexact[Array, "*shape"],
    local: LocalMoments,
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    dtype: jax.typing.DTypeLike,
) -> Inexact[Array, "*shape"]:
    """The same with moments that are given."""
    return _normalize_with(jnp.dtype(dtype), x, local, scale, bias)


@partial(jax.jit, static_argnums=0, inline=True)
def _normalize_with(dtype, x, local, scale, bias):
    @_kept
    def run(x, local: LocalMoments, scale, bias):
        return _affine(local.standardize(x), scale, bias, dtype)

    return run(x, local, scale, bias)


def _affine(xhat, scale, bias, dtype):
    wide = promoted(xhat.dtype, dtype)
    y = xhat.astype(wide)
    if scale is not None:
        y = y * scale.astype(wide)
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(dtype)


@overload
def along(parameter: None, feature_axes: tuple[int, ...], ndim: int) -> None: ...
@overload
def along(parameter: Array, feature_axes: tuple[int, ...], ndim: int) -> Array: ...
def along(parameter, feature_axes, ndim):
    """A parameter of the feature axes' shape, with size 1 on all other axes of a rank `ndim`."""
    if parameter is None:
        return None
    sizes = dict(zip(feature_axes, parameter.shape, strict=True))
    return parameter.reshape([sizes.get(a, 1) for a in range(ndim)])
