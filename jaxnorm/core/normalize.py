"""Normalize an array: measure its slices, standardize, apply the epilogue.

Two functions carry a derivative rule each, so that the moments can be kept between the passes and
xhat recomputed. Both rules are made of xhat and rstd alone, which come from these same functions:
so the derivatives of the derivatives are right too, in both modes, and none passes through a number
of the size of x^2.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Inexact

from jaxnorm.core import cpu
from jaxnorm.core.blocks import reduce_blocks, reshard_like
from jaxnorm.core.epilogue import Epilogue, affine
from jaxnorm.core.measure import Measurement, Strategy, Way, measure
from jaxnorm.core.moments import LocalMoments, Measured, wide_dtype
from jaxnorm.core.strategy import choose_strategy

# Between the passes `x` is kept in its own dtype, and the moments, which bear this name. All else
# is recomputed, in the wide dtype, and the gradient rounded once.
MOMENTS = "jaxnorm_moments"
_checkpoint = partial(
    jax.checkpoint,
    prevent_cse=False,
    policy=jax.checkpoint_policies.save_only_these_names(MOMENTS),
)


# What the families call.


def normalize(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    measurement: Measurement,
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None = None,
    epilogue: Epilogue,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """``epilogue((x - mean) * rstd, scale, bias)`` with the moments of `x`, and those moments.

    Computed in float32 at least and rounded once.

    Args:
        x: the data, in its own dtype.
        scale: of the rank of `x`; None for 1.
        bias: likewise; None for 0.
        measurement: which elements make up a slice, and what is measured of it.
        mask: which elements count; None for all.
        guess: a value expected near the mean of each slice, the same on all replicas; None for
            one taken from the slice.
        epilogue: what follows.
    """
    bare = measurement.slices.replicas.mapped
    static = measurement, epilogue
    arrays = x, scale, bias, mask, guess
    return _run(_normalize, static, *arrays, bare=bare, constant=epilogue.is_constant)


def normalize_with(
    x: Inexact[Array, "*shape"],
    local: LocalMoments,
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    epilogue: Epilogue,
) -> Inexact[Array, "*shape"]:
    """Normalize with moments that are given."""
    arrays = x, local, scale, bias
    return _run(_normalize_with, (epilogue,), *arrays, constant=epilogue.is_constant)


def measured_moments(
    x: Inexact[Array, "*shape"], measurement: Measurement, mask: Bool[Array, "*#shape"] | None
) -> Measured:
    """The moments alone, without a normalized array."""
    bare = measurement.slices.replicas.mapped
    return _run(_measured_moments, (measurement,), x, mask, bare=bare)


def _run(function: Callable, static: tuple, *arrays, bare: bool = False, constant: bool = True):
    """Run a function so that its backward pass keeps the inputs and the moments, and little else.

    Compiled once for each shape where it is called outside of `jit`; inside, that dissolves.

    Args:
        function: called with `static` and `arrays`.
        static: hashable values, which tell one program from another.
        *arrays: trees of arrays.
        bare: whether its rules of differentiation stand in no `jit` and no `checkpoint`, which
            replicas that are examples of a `vmap` demand; see `Replicas.mapped`.
        constant: whether a trace made with these static values may be used again.
    """
    if bare:
        return function(*static, *arrays)
    return (_compiled if constant else _checkpointed)(function, static, *arrays)


def _checkpointed(function: Callable, static: tuple, *arrays):
    return _checkpoint(partial(function, *static))(*arrays)


_compiled = jax.jit(_checkpointed, static_argnums=(0, 1), inline=True)


def _normalize(measurement: Measurement, epilogue: Epilogue, x, scale, bias, mask, guess):
    factor, shift = epilogue.parameters(x, scale, bias)
    y, measured = standardize(measurement, x, mask, guess, factor, shift)
    return epilogue.rounded(y), measured


def _normalize_with(epilogue: Epilogue, x, local: LocalMoments, scale, bias):
    return epilogue(local.standardize(x), scale, bias)


def _measured_moments(measurement: Measurement, x, mask) -> Measured:
    return standardize(measurement, x, mask)[1]


def standardize(
    measurement: Measurement,
    x: Inexact[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Inexact[Array, "*#shape"] | None = None,
    factor: Inexact[Array, "*#shape"] | None = None,
    shift: Inexact[Array, "*#shape"] | None = None,
) -> tuple[Inexact[Array, "*shape"], Measured]:
    """xhat * factor + shift in the wide dtype, and the moments; differentiable to any order.

    Args:
        measurement: which elements make up a slice, and what is measured of it.
        x: the data, in its own dtype.
        mask: which elements count; None for all.
        guess: a value expected near the mean of each slice; None for one taken from the slice.
        factor: None for 1; as wide as widened `x` at least.
        shift: None for 0; of the dtype of `factor`.
    """
    wide = x.astype(wide_dtype(x.dtype))
    if any(jax.typeof(x).sharding.spec):
        # On an Explicit mesh what is chosen and what chooses must have one layout; and a product
        # of what is replicated is replicated too, though it may be as large as x.
        mask = None if mask is None else reshard_like(jnp.broadcast_to(mask, x.shape), x)
        factor, shift = (None if p is None else reshard_like(p, x) for p in (factor, shift))
    strategy = choose_strategy(measurement, wide, stored=x.dtype, has_guess=guess is not None)
    measured = jax.tree.map(_named, _measure(measurement, strategy, wide, mask, guess))
    count = None if mask is None else measured.count  # else it is known without being kept
    y = _standardize(measurement, strategy, wide, mask, count, measured.local, factor, shift)
    return y, measured


# What kernels call for a block in fast memory, where nothing is kept and all may be read again.


def normalize_block(
    x: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    measurement: Measurement,
    mask: Bool[Array, "*#shape"] | None,
    epilogue: Epilogue,
) -> Inexact[Array, "*shape"]:
    """Normalize a block in fast memory."""
    *_, xhat = _standardize_block(measurement, x, mask)
    return epilogue(xhat, scale, bias)


def pull_back_block(
    x: Inexact[Array, "*shape"],
    dy: Inexact[Array, "*shape"],
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
    *,
    measurement: Measurement,
    mask: Bool[Array, "*#shape"] | None,
    epilogue: Epilogue,
):
    """Cotangents of `x`, scale and bias, not rounded, from that of `normalize_block`'s result."""
    strategy, wide, measured, xhat = _standardize_block(measurement, x, mask)
    given = [p if p is None else p.astype(wide_dtype(p.dtype)) for p in (scale, bias)]
    _, pull = jax.vjp(epilogue, xhat, *given)
    dxhat, *dgiven = pull(dy)
    count = None if mask is None else measured.count
    # The map of tangents is its own transpose.
    primals = wide, mask, count, measured.local, None, None
    tangents = dxhat, None, None, None, None, None
    return _standardize_jvp(measurement, strategy, primals, tangents)[1], *dgiven


def _standardize_block(measurement: Measurement, x, mask):
    """The strategy for a block; the block widened, its moments, and xhat."""
    strategy = Strategy(Way.TWO_READS if measurement.centered else Way.RAW, in_block=True)
    wide = x.astype(wide_dtype(x.dtype))
    measured = measure(measurement, strategy, wide, mask, None)
    xhat = _broadcast(measurement, strategy, measured.local, wide).standardize(wide)
    return strategy, wide, measured, xhat


# The two functions with a derivative rule.


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _measure(measurement: Measurement, strategy: Strategy, x, mask, guess) -> Measured:
    return (cpu.measured if strategy.cpu_measured else measure)(
        measurement, strategy, x, mask, guess
    )


@_measure.defjvp
def _measure_jvp(measurement: Measurement, strategy: Strategy, primals, tangents):
    """d mean = <dx>, d rstd = -rstd^2 i and d var = 2 i / rstd with i = <Re(conj(xhat) dx)>."""
    x, mask, guess = primals
    dx, *_ = tangents
    measured = _measure(measurement, strategy, x, mask, guess)
    count, local = measured.count, measured.local
    xhat = _standardize(measurement, strategy, x, mask, count, local, None, None)
    dmean, inner = means_of_tangent(measurement, xhat, mask, count, dx)
    rstd, zero = local.rstd, jnp.zeros_like
    dvar = jnp.where(rstd > 0, inner + inner, 0) / jnp.where(rstd > 0, rstd, 1)
    dlocal = LocalMoments(zero(local.origin), dmean, -(inner * rstd) * rstd)
    return measured, Measured(dlocal, zero(count), dvar)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _standardize(
    measurement: Measurement, strategy: Strategy, x, mask, count, local: LocalMoments, factor, shift
):
    del mask, count
    return affine(_broadcast(measurement, strategy, local, x).standardize(x), factor, shift)


@_standardize.defjvp
def _standardize_jvp(measurement: Measurement, strategy: Strategy, primals, tangents):
    """dxhat = rstd (dx - <dx> - xhat <Re(conj(xhat) dx)>), <.> the mean over a slice.

    The whole derivative, through the moments too, which are those of the same x: a linear map of
    dx, its own transpose where nothing is masked out.

    With y = f xhat + s it is written as ``dy = f rstd dx + xhat b + c``, b = df - f rstd <xhat dx>
    and c = ds - f rstd <dx>, so that its transpose sums dy and xhat dy and nothing else: all that
    the gradients with respect to x, f and s need of them.
    """
    x, mask, count, local, factor, shift = primals
    dx, _, _, _, dfactor, dshift = tangents
    xhat = _standardize(measurement, strategy, x, mask, count, local, None, None)
    y = affine(xhat, factor, shift)
    total = partial(_total, measurement, strategy, local.rstd)
    dmean, inner = means_of_tangent(measurement, xhat, mask, count, dx, total)
    parts = LocalMoments(dmean, inner.astype(x.dtype), local.rstd)
    dmean, inner, rstd = _broadcast(measurement, strategy, parts, x)
    rstd = rstd.astype(x.dtype)
    slope = _times(measurement, strategy, inner * -rstd, factor, x.shape)
    slope = slope if factor is None else slope + dfactor
    if strategy.cpu_large:
        # Where rstd is zero so is xhat, which the slope is multiplied with.
        slope = cpu.materialize(jnp.broadcast_to(slope, x.shape), rstd, full=True)
    dy = (dx * rstd).astype(y.dtype)
    dy = dy if factor is None else dy * factor
    dy = dy + xhat.astype(y.dtype) * slope.astype(y.dtype)
    if measurement.centered:
        dy = dy + _times(measurement, strategy, dmean * -rstd, factor, x.shape).astype(y.dtype)
    return y, dy if shift is None else dy + dshift


def means_of_tangent(
    measurement: Measurement, xhat, mask, count, dx, total: Callable | None = None
):
    """<dx>, zero for raw moments, and <Re(conj(xhat) dx)>, in one collective."""
    slices = measurement.slices
    total = total or partial(slices.reduce, jnp.sum)
    if mask is not None:
        xhat, dx = jnp.where(mask, xhat, 0), jnp.where(mask, dx, 0)
    product = jnp.real(jnp.conj(xhat) * dx) if jnp.iscomplexobj(xhat) else xhat * dx
    n = slices.size(xhat.shape) if mask is None else jnp.maximum(count, 1)
    n = jnp.asarray(n, product.dtype)  # an int may be larger than an int32
    if not measurement.centered:
        (inner,) = slices.replicas.sum(total(product))
        return jnp.zeros((1,) * dx.ndim, dx.dtype), inner / n
    first, inner = slices.replicas.sum(total(dx), total(product))
    return first / n.astype(first.dtype), inner / n


def _total(measurement: Measurement, strategy: Strategy, rstd, array):
    """Sums over the slices; on CPUs those of large arrays are kept before blocks are formed."""
    slices = measurement.slices
    if slices.blocks is None or not strategy.cpu_large:
        return slices.reduce(jnp.sum, array)
    sums = jnp.sum(array, axis=slices.axes, keepdims=True)
    sums = cpu.materialize(sums, slices.broadcast(rstd, sums))
    return reduce_blocks(jnp.sum, sums, *slices.blocks)


def _broadcast(
    measurement: Measurement, strategy: Strategy, local: LocalMoments, x
) -> LocalMoments:
    """Local moments with size 1 or that of `x` on all axes: those of blocks, for each entry."""
    slices = measurement.slices
    if slices.blocks is None:
        return local
    wide = [slices.broadcast(part, x) for part in local]
    if strategy.cpu_large:
        wide = [
            w if w.shape == p.shape else cpu.materialize(w, wide[-1]) for w, p in zip(wide, local)
        ]
    return LocalMoments(*wide)


def _times(measurement: Measurement, strategy: Strategy, per_slice, factor, shape):
    """The product of a per-slice array and the factor."""
    if factor is None:
        return per_slice
    per_slice = per_slice.astype(factor.dtype)
    first = min(measurement.slices.axes, default=0)
    ones = [1] * len(shape)
    outer = (*shape[:first], *ones[first:]), (*ones[:first], *shape[first:])
    # Where all of the one meets all of the other it is a product of matrices, which its transpose
    # is too: on CPUs a slice of an array is so weighted and summed in one go.
    if strategy.cpu_large and (per_slice.shape, factor.shape) == outer:
        return cpu.product(per_slice, factor, shape)
    return per_slice * factor


def _named(array: Array) -> Array:
    # In parts: JAX cannot keep a complex array by name.
    if jnp.iscomplexobj(array):
        return lax.complex(_named(jnp.real(array)), _named(jnp.imag(array)))
    return checkpoint_name(array, MOMENTS)
