"""Moments of 16-bit numbers from one read, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import jit_as_users

import jaxnorm
from jaxnorm.core import exact_sums
from jaxnorm.core.measure import Measurement, Strategy, Way, measure
from jaxnorm.core.slices import Slices
from jaxnorm.core.tpu import row_major

OFFSETS = {"bfloat16": (0, 3, 1e2, 1e5, 1e30, 1e36), "float16": (0, 3, 1e2, 1e3, 6e4)}


def rows(dtype, size, offset, spread):
    x = np.random.default_rng(0).normal(offset, spread, (4, size))
    limit = float(jnp.finfo(dtype).max)
    return np.clip(x, -limit, limit).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bfloat16", size) for size in (1, 2, 3, 100, 8192)]
    + [("float16", size) for size in (1, 100, 8192)],
)
def test_as_exact_as_a_second_read(dtype, size):
    measurement, how = Measurement(Slices((1,))), Strategy(Way.EXACT_SUMS, jnp.dtype(dtype))
    assert exact_sums.exact(dtype, size)
    run = jit_as_users(lambda x: measure(measurement, how, x.astype(jnp.float32), None, None))
    for offset in OFFSETS[dtype]:
        for share in (1.0, 2.0**-7):  # of the offset: the least that the dtype tells from nothing
            x = rows(dtype, size, offset, max(offset * share, 1.0 if offset == 0 else 0.0))
            found = run(x)
            exact = x.astype(np.float64)
            mean, deviation = exact.mean(1, keepdims=True), exact.std(1, keepdims=True)
            local = found.local
            got = np.asarray(local.origin, np.float64) + np.asarray(local.mean, np.float64)
            rstd = np.asarray(local.rstd, np.float64)
            # What a sum of that many numbers of several magnitudes rounds, and little more.
            budget = 2.0**-24 * (8 + 2 * np.sqrt(size))
            flat = deviation == 0
            np.testing.assert_array_less(np.abs(got - mean)[~flat], (budget * deviation)[~flat])
            np.testing.assert_allclose((rstd * deviation)[~flat], 1, atol=budget)
            np.testing.assert_array_equal(rstd[flat], 0)


def test_one_repeated_value_has_no_spread():
    for value in (10000.1, -3e38, 1e-3):
        x = jnp.asarray(np.full((2, 1000), value, jnp.bfloat16))
        y = jaxnorm.layer_norm(x, epsilon=0.0)
        np.testing.assert_array_equal(y, np.zeros((2, 1000), jnp.bfloat16))


def test_where_it_is_not_exact_it_is_not_used():
    assert not exact_sums.exact(jnp.float32, 8)
    assert not exact_sums.exact(jnp.bfloat16, 2**16 + 1) and exact_sums.exact(jnp.bfloat16, 2**16)
    assert not exact_sums.exact(jnp.float16, 2**13 + 1) and exact_sums.exact(jnp.float16, 2**13)


def test_the_order_in_memory_changes_no_number_and_follows_vmap():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for axis in range(3):
        mapped = jax.vmap(row_major, axis, axis)(x)
        np.testing.assert_array_equal(mapped, x)
    jaxpr = jax.make_jaxpr(jax.vmap(row_major, 1))(x)
    (equation,) = (e for e in jaxpr.eqns if e.primitive.name == "jaxnorm_row_major")
    assert equation.params["axes"] == (1, 0, 2)
