"""Each kind of input is measured in the way that the README of the core says."""

import jax.numpy as jnp
import pytest

from jaxnorm.core import cpu
from jaxnorm.core.measure import Measurement, Way
from jaxnorm.core.replicas import Replicas
from jaxnorm.core.slices import Slices
from jaxnorm.core.strategy import choose_strategy


class Mapped(Replicas):
    """Replicas that are examples of a `vmap`."""

    mapped = True


ROWS, BLOCKS = Slices((1,)), Slices((0,), (1, 2))
SHARED = Slices((1,), replicas=Mapped())


@pytest.mark.parametrize(
    ("measurement", "size", "stored", "has_guess", "way"),
    [
        (Measurement(ROWS, centered=False), 8, "float32", False, Way.RAW),
        (Measurement(ROWS, centered=False, two_pass=True), 8, "bfloat16", False, Way.RAW),
        (Measurement(ROWS, two_pass=True), 8, "bfloat16", True, Way.TWO_PASS),
        (Measurement(SHARED), 8, "bfloat16", True, Way.TWO_READS),
        (Measurement(ROWS), 8, "bfloat16", True, Way.GUESS),
        (Measurement(ROWS), 8, "bfloat16", False, Way.EXACT_SUMS),
        (Measurement(ROWS), 2**16, "bfloat16", False, Way.EXACT_SUMS),
        (Measurement(ROWS), 2**16 + 2, "bfloat16", False, Way.TWO_READS),
        (Measurement(ROWS), 2**13 + 2, "float16", False, Way.TWO_READS),
        (Measurement(ROWS), 8, "float32", False, Way.TWO_READS),
    ],
)
def test_way(measurement, size, stored, has_guess, way):
    x = jnp.zeros((2, size), jnp.float32)
    found = choose_strategy(measurement, x, stored=jnp.dtype(stored), has_guess=has_guess)
    assert found.way is way
    assert found.cpu_large == (2 * size >= cpu.LARGE)


@pytest.mark.parametrize(
    ("measurement", "dtype", "cpu_measured", "row_major"),
    [
        (Measurement(ROWS), "float32", True, True),
        (Measurement(ROWS, two_pass=True), "float32", False, True),
        (Measurement(SHARED), "float32", False, True),
        (Measurement(ROWS), "complex64", False, True),
        (Measurement(Slices((0,))), "float32", True, False),
        (Measurement(BLOCKS), "float32", True, False),
    ],
)
def test_hints_for_platforms(measurement, dtype, cpu_measured, row_major):
    x = jnp.zeros((2, 8), dtype)
    found = choose_strategy(measurement, x, stored=x.dtype, has_guess=False)
    assert (found.cpu_measured, found.row_major) == (cpu_measured, row_major)
