"""All that exists for XLA's CPU backend only.

A CPU pays for memory and for each loop that is compiled, and its compiler computes a broadcast
value anew for each element that it meets. So on a CPU

* small arrays are measured by the textbook's two passes in float64: half the loops to compile;
* large ones by sums about a guess or zero, which run at the speed of memory, and where that is too
  far from a slice by sums about the mean of a sample;
* the derivatives of large ones are told which values to compute once, and which products to sum as
  products of matrices.

Each is a primitive with a lowering of its own for CPUs. On other platforms they are what `measure`
says, their operand, and a plain product: nothing of this file is compiled there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jaxnorm._jax import (
    instantiated,
    is_linear,
    is_single_program,
    lower,
    lower_identity,
    lowering,
    make_primitive,
)
from jaxnorm.core import measure
from jaxnorm.core.exact_sums import share_of
from jaxnorm.core.measure import Measurement, Strategy
from jaxnorm.core.moments import LocalMoments, Measured, saturate
from jaxnorm.core.slices import Slices

# Elements of an array from which on more is compiled to make it faster.
LARGE = 2**18
# A sum of squares below this has not overflowed on the way.
_BIG = np.float32(2.0**100)


def is_unsharded(x: Inexact[Array, "*shape"]) -> bool:
    """True if the type of `x` names no mesh and no symbolic size."""
    return jax.typeof(x).sharding.mesh.empty and all(isinstance(n, int) for n in x.shape)


def is_large(x: Inexact[Array, "*shape"]) -> bool:
    """True if `x` is large enough for what pays for its compile time only then."""
    return is_unsharded(x) and x.size >= LARGE


# The moments.


@dataclass(frozen=True)
class _Call:
    """The static half of a measurement's operands."""

    measurement: Measurement
    strategy: Strategy
    has_mask: bool
    has_guess: bool

    def measure(self, by: Callable, x: Array, *rest: Array) -> list[Array]:
        """The results of the primitive, as `by` measures them."""
        some = iter(rest)
        mask = next(some) if self.has_mask else None
        guess = next(some) if self.has_guess else None
        found = by(self.measurement, self.strategy, x, mask, guess)
        local = found.local if self.measurement.centered else (found.local.rstd,)
        return [*local, found.var, *([found.count] if self.has_mask else [])]


def measured(
    measurement: Measurement,
    strategy: Strategy,
    x: Float[Array, "*shape"],
    mask: Bool[Array, "*#shape"] | None,
    guess: Float[Array, "*#shape"] | None,
) -> Measured:
    """As `measure.measure`, and on CPUs in the way that suits these."""
    call = _Call(measurement, strategy, mask is not None, guess is not None)
    found = _measure_p().bind(x, *(a for a in (mask, guess) if a is not None), call=call)
    size = measurement.slices.size(x.shape)
    count = found.pop() if call.has_mask else jnp.full_like(found[-1], size)
    *local, var = found
    if not measurement.centered:
        zero = jnp.zeros((1,) * x.ndim, x.dtype)
        local = zero, zero, *local
    return Measured(LocalMoments(*local), count, var)


@cache
def _measure_p():
    # Made when it is first used: what primitives are made of takes long to load.
    return make_primitive(
        "jaxnorm_measure",
        several=True,
        value=_measure_now,
        result=_measured_types,
        batch=_measure_batched,
        lowerings={None: _lower_measure, "cpu": _lower_measure_on_cpu},
    )


def _measure_now(*operands, call: _Call):
    # One program, also where a user has turned `jit` off: a primitive is one step.
    with jax.disable_jit(False):
        return _compiled_measure(call, *operands)


@partial(jax.jit, static_argnums=0)
def _compiled_measure(call: _Call, *operands):
    return _measure_p().bind(*operands, call=call)


def _measured_types(x, *_, call: _Call):
    shape = call.measurement.slices.reduced_shape(x.shape)
    number = (4 if call.measurement.centered else 2) + call.has_mask
    return [x.update(shape=shape, weak_type=False)] * number


def _measure_batched(operands, places, *, call: _Call):
    size, (x, *rest) = _leading(operands, places)
    x = jnp.broadcast_to(x, (size, *x.shape[1:]))
    found = _measure_p().bind(
        x, *rest, call=replace(call, measurement=call.measurement.with_leading_axis())
    )
    return found, [0] * len(found)


def _lower_measure(context, *operands, call: _Call):
    return lower(partial(call.measure, measure.measure), context, *operands, several=True)


def _lower_measure_on_cpu(context, *operands, call: _Call):
    x, *_ = context.avals_in
    small = x.size < LARGE
    suited = x.dtype == np.float32 and (small or not call.has_mask)
    if not (suited and is_single_program(context)):
        return _lower_measure(context, *operands, call=call)
    large_way = _about_guess if call.measurement.centered else _squares
    by = partial(_measure_by, _two_reads_in_float64 if small else large_way)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return lower(partial(call.measure, by), context, *operands, several=True)


def _measure_by(way: Callable, measurement: Measurement, strategy: Strategy, x, mask, guess):
    """The result of a way that finds count, origin, mean of ``x - origin``, var in float64."""
    *parts, var = way(measurement, strategy, x, mask, guess)
    narrow = x.dtype
    count, origin, mean = (jnp.broadcast_to(part, var.shape).astype(narrow) for part in parts)
    with_epsilon = var + measurement.epsilon
    # Below, powers of rstd would leave the range; float32 has no such variance either.
    flat = (with_epsilon < float(np.finfo(narrow).tiny)) | (count == 0)
    root = jnp.sqrt(jnp.where(flat, 1, with_epsilon)).astype(narrow)
    rstd = jnp.where(flat, 0, 1).astype(narrow) / root
    return Measured(LocalMoments(origin, mean, rstd), count, saturate(var, narrow))


def _two_reads_in_float64(measurement: Measurement, strategy: Strategy, x, mask, guess):
    """A mean, then the moments about it: numbers of 24 bits in sums of 53, exact at any offset."""
    del strategy, guess
    slices = measurement.slices

    def total(function, terms):
        wide = function(terms.astype(np.float64))  # in one loop with the sum, without an array
        return slices.reduce(jnp.sum, wide if mask is None else jnp.where(mask, wide, 0))

    count = slices.size(x.shape) if mask is None else total(jnp.ones_like, x)
    n = count if mask is None else jnp.maximum(count, 1)
    if not measurement.centered:
        return count, np.float32(0), np.float32(0), total(jnp.square, x) / n
    mean = total(jnp.asarray, x) / n
    origin = mean.astype(x.dtype)
    m2 = 4 * total(jnp.square, _half_deviations(slices, x, origin))
    rest = _where_within(m2, mean - origin).astype(x.dtype)
    var = jnp.maximum(m2 / n - rest.astype(np.float64) ** 2, 0)
    return count, _where_within(m2, origin), _divided_by_one(rest, rest), var


def _squares(measurement: Measurement, strategy: Strategy, x, mask, guess):
    """Raw second moments: squares summed in float32, or where they overflow in float64."""
    del mask, guess
    total = partial(measurement.slices.reduce, jnp.sum)
    square, stored = total(x * x), strategy.narrowed(x)

    def anew():
        wide = stored.astype(np.float64)
        return total(wide * wide)

    good = measure.all_true(square < _BIG)
    square = lax.cond(good, lambda: square.astype(np.float64), anew)
    size = measurement.slices.size(x.shape)
    return size, np.float32(0), np.float32(0), square / size


def _about_guess(measurement: Measurement, strategy: Strategy, x, mask, guess):
    """One read about the guess, or about zero; if that was a poor guess, another about a sample.

    Sums of `x` and of its squares run at the speed of memory. Those of anything else need an array
    of it first, such as of the differences from a guess.
    """
    del mask
    slices, narrow, stored = measurement.slices, x.dtype, strategy.narrowed(x)
    size, total = slices.size(x.shape), partial(slices.reduce, jnp.sum)
    guess = jnp.zeros((1,) * x.ndim, narrow) if guess is None else guess.astype(narrow)
    z = x - slices.broadcast(guess, x)
    square, mean = total(z * z), total(z) * np.float32(1 / size)
    var = jnp.maximum(square * np.float32(1 / size) - mean * mean, 0)
    good = (square < _BIG) & (jnp.abs(mean) <= measure.NEAR * jnp.sqrt(var))

    # The sums of squares are those of halves.
    def about_guess():
        return square.astype(np.float64) / 4, mean, jnp.broadcast_to(guess, mean.shape)

    def about_sample():
        x = stored.astype(narrow)
        origin = _mean_of_sample(slices, x)
        half = _half_deviations(slices, x, origin)
        wide = half.astype(np.float64)
        share = share_of(int(size))  # here the sum alone may be too large
        square = total(wide * wide)
        mean = total(half * np.float32(share)) * np.float32(2 / (share * size))
        return square, *(_where_within(4 * square, part) for part in (mean, origin))

    square, mean, origin = lax.cond(measure.all_true(good), about_guess, about_sample)
    var = square * (4 / size) - mean.astype(np.float64) ** 2
    return size, origin, mean, jnp.maximum(var, 0)


def _mean_of_sample(slices: Slices, x):
    """The mean of an eighth of each slice or more, from its middle, rounded once.

    The mean of a part f of a slice lies within ``sqrt((1 - f) / f)`` deviations of the slice's: at
    an eighth the subtraction in ``mean(z^2) - mean(z)^2`` costs three bits at worst. For a slice of
    one repeated value it is that value.
    """
    start, end = [0] * x.ndim, list(x.shape)
    for a in sorted(slices.axes, key=lambda a: x.shape[a])[-1:]:
        length = -(-x.shape[a] // 8)
        start[a] = (x.shape[a] - length) // 2
        end[a] = start[a] + length
    sample = lax.slice(x, start, end)
    total = slices.reduce(jnp.sum, sample.astype(np.float64))
    return (total / slices.size(sample.shape)).astype(x.dtype)


def _half_deviations(slices: Slices, x, origin):
    """``(x - origin) / 2``: halved, no difference leaves the range."""
    near = slices.broadcast(origin, x)
    near = _divided_by_one(near, near)
    return x * np.float32(0.5) - near * np.float32(0.5)


def _where_within(m2, part):
    """A part of the mean; 0 at the very end of the range, where nothing is subtracted.

    As in `measure._rescaled`, from a sum of squares about any point of the slice.
    """
    return jnp.where(m2 < (float(np.finfo(np.float32).max) / 2) ** 2, part, 0)


# What is computed once.


def materialize(array: Array, divisor: Array, *, full: bool = False) -> Array:
    """An equal array that CPUs keep in memory, linear in `array`.

    Args:
        array: what is to be kept.
        divisor: known values that broadcast to it; finite ones change nothing.
        full: whether `array` is what a sum weighs another with, and may be zero where `divisor` is.
    """
    return _materialize_p().bind(array, divisor, full=full)


@cache
def _materialize_p():
    return make_primitive(
        "jaxnorm_materialize",
        value=lambda array, divisor, full: array,
        result=lambda array, divisor, full: array,
        jvp=lambda primals, tangents, full: (
            materialize(*primals, full=full),
            materialize(instantiated(tangents[:1])[0], primals[1], full=full),
        ),
        transpose=lambda cotangent, array, divisor, full: [
            materialize(instantiated([cotangent])[0], divisor, full=full), None
        ],
        batch=_materialize_batched,
        lowerings={None: lower_identity, "cpu": lowering(_kept)},
    )  # fmt: skip


def _materialize_batched(operands, places, *, full: bool):
    size, (array, divisor) = _leading(operands, places)
    array = jnp.broadcast_to(array, (size, *array.shape[1:]))
    return materialize(array, divisor, full=full), 0


def _kept(array, divisor, *, full: bool):
    return (_kept_where if full else _divided_by_one)(array, divisor)


def _divided_by_one(array, divisor):
    """An equal array that ends in a division, and is therefore computed once.

    XLA for CPUs computes all else anew for each element that it meets, even if that means to find
    out to which block of an axis the element belongs.
    """
    return array / jnp.where(divisor == divisor, 1, divisor).astype(array.dtype)


def _kept_where(array, divisor):
    """An array that ends in a choice, and is therefore kept in memory, where sums are fast.

    That also keeps the array from being computed anew for each sum.
    """
    return jnp.where(divisor != 0, array, jnp.zeros_like(array))


# Products that are summed.


def product(a: Array, b: Array, shape: tuple[int, ...]) -> Array:
    """``a * b``, summed over the axes on which `shape` has size 1; on CPUs a product of matrices.

    All three have one rank, and each axis has one size or 1. So its two transposes are its like.
    """
    return _product_p().bind(a, b, shape=shape)


@cache
def _product_p():
    return make_primitive(
        "jaxnorm_product",
        value=lambda a, b, shape: _multiplied(a, b, shape),
        result=lambda a, b, shape: a.update(shape=shape, weak_type=False),
        jvp=_product_jvp,
        transpose=_product_transposed,
        batch=_product_batched,
        lowerings={None: lowering(_multiplied), "cpu": lowering(_contracted)},
    )


def _product_jvp(primals, tangents, *, shape):
    (a, b), (da, db) = primals, instantiated(tangents)
    return product(a, b, shape), product(da, b, shape) + product(a, db, shape)


def _product_transposed(cotangent, a, b, *, shape):
    (cotangent,) = instantiated([cotangent])
    if is_linear(a):
        return [product(cotangent, b, a.aval.shape), None]
    return [None, product(a, cotangent, b.aval.shape)]


def _product_batched(operands, places, *, shape):
    size, (a, b) = _leading(operands, places)
    return product(a, b, (size, *shape)), 0


def _multiplied(a, b, shape):
    product = a * b
    axes = [i for i, (n, m) in enumerate(zip(product.shape, shape)) if n != m]
    return jnp.sum(product, axes, keepdims=True) if axes else product


def _contracted(a, b, shape):
    def labels(sizes):
        return [i for i, n in enumerate(sizes) if n > 1]

    def squeezed(array):
        return array.reshape([n for n in array.shape if n > 1]), labels(array.shape)

    summed = jnp.einsum(*squeezed(a), *squeezed(b), labels(shape), precision=lax.Precision.HIGHEST)
    return summed.reshape(shape)


def _leading(operands, places):
    """The size of a batch, and the operands with its axis, or one of size 1, in front."""
    size = next(o.shape[p] for o, p in zip(operands, places) if p is not None)
    return size, [o[None] if p is None else jnp.moveaxis(o, p, 0) for o, p in zip(operands, places)]
