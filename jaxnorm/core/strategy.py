"""The choice of the way in which an array is measured, at the one place that makes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from jaxnorm.core import cpu, exact_sums
from jaxnorm.core.measure import Measurement, Strategy, Way


def choose_strategy(
    measurement: Measurement,
    x: Inexact[Array, "*shape"],
    *,
    stored: jax.typing.DTypeLike,
    has_guess: bool,
) -> Strategy:
    """The way in which `x` is measured; README.md beside this file has the table.

    Args:
        measurement: what is measured.
        x: the data, widened.
        stored: the dtype that it was widened from.
        has_guess: whether values near the means are known before.
    """
    slices = measurement.slices
    way = _way(measurement, x, stored, has_guess)
    unsharded = cpu.is_unsharded(x)
    real = not jnp.iscomplexobj(x)
    trailing = tuple(range(x.ndim - len(slices.axes), x.ndim))
    return Strategy(
        way,
        stored,
        row_major=slices.blocks is None and slices.axes == trailing,
        cpu_measured=unsharded and real and slices.replicas.is_single and way is not Way.TWO_PASS,
        cpu_large=cpu.is_large(x),
    )


def _way(measurement: Measurement, x, stored, has_guess: bool) -> Way:
    if not measurement.centered:
        return Way.RAW
    if measurement.two_pass:
        return Way.TWO_PASS
    replicas, size = measurement.slices.replicas, measurement.slices.size(x.shape)
    if has_guess:
        # A branch cannot stand where the replicas are examples of a vmap; see `Replicas.mapped`.
        return Way.TWO_READS if replicas.mapped else Way.GUESS
    if isinstance(size, int) and exact_sums.exact(stored, size):  # else it is a symbol
        return Way.EXACT_SUMS
    return Way.TWO_READS
