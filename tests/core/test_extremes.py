"""No finite input gives a NaN or an infinity, in the value or in any derivative."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, FROM_OUTPUT, GROUP, INSTANCE, LAYER, RMS, cotangent
from compiling import jit_as_users
from jax.experimental import checkify

pytestmark = pytest.mark.usefixtures("ways_to_measure")

MAX = float(np.finfo(np.float32).max)
RNG = np.random.default_rng(0)
SHAPE = (4, 3, 6)
EXTREMES = {
    "1e30": RNG.normal(size=SHAPE) * 1e30,
    "largest, both signs": RNG.choice([-MAX, MAX], size=SHAPE),
    "largest": np.full(SHAPE, MAX),
    "one of another sign": np.where(np.arange(6) == 0, -MAX, MAX) * np.ones(SHAPE),
    "1e30 beside 1": np.where(np.arange(4)[:, None, None] == 0, 1e30, 1) * RNG.normal(size=SHAPE),
    "subnormal": RNG.normal(size=SHAPE) * 1e-40,
    "1e-20": RNG.normal(size=SHAPE) * 1e-20,
    "zero": np.zeros(SHAPE),
    "constant": np.full(SHAPE, 10000.1),
    "constant channels": np.ones(SHAPE) * np.linspace(-1e4, 1e4, 6),
    "edge of float16": RNG.choice([-65504.0, 65504.0], size=SHAPE),
}
FUNCTIONS = (BATCH, LAYER, RMS, GROUP, INSTANCE, FROM_OUTPUT)


@pytest.mark.parametrize("epsilon", [None, 0.0])
@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
def test_all_finite(case, epsilon):
    options = {} if epsilon is None else {"epsilon": epsilon}
    _, scale, bias = case.arguments()
    ct = cotangent(SHAPE)

    # As users have it where the least stands between the data and a division by zero.
    @(jit_as_users if epsilon == 0 else jax.jit)
    def run(x):
        function = lambda x: case.function(x, scale, bias, **options)  # noqa: E731
        gradient = jax.grad(lambda x: jnp.vdot(function(x), ct))
        return function(x), *jax.jvp(gradient, (x,), (ct,))

    for name, x in EXTREMES.items():
        for what, a in zip(("value", "gradient", "second"), run(jnp.asarray(x, jnp.float32))):
            assert np.isfinite(a).all(), (name, what)


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
def test_nothing_on_the_way_is_no_number(case):
    """`checkify` reports every NaN and division by zero, be its result used or not."""
    _, scale, bias = case.arguments()
    ct = cotangent(SHAPE)

    @jax.jit
    @partial(checkify.checkify, errors=checkify.float_checks)
    def run(x):
        y, back = jax.vjp(lambda x: case.function(x, scale, bias), x)
        return y, back(ct)

    for name, x in EXTREMES.items():
        error, _ = run(jnp.asarray(x, jnp.float32))
        assert error.get() is None, (name, error.get())


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("factor", [1e30, 1e37, 1e-15])
def test_scale_invariant_without_epsilon(case, factor):
    x, scale, bias = case.arguments()
    got = case.function(x * factor, scale, bias, epsilon=0.0)
    np.testing.assert_allclose(got, case.function(x, scale, bias, epsilon=0.0), atol=2e-5)


@cache
def masked(case):
    """Value and derivatives of a function of a mask, the cotangent and the arguments."""

    @jax.jit
    def run(mask, ct, *arguments):
        y, back = jax.vjp(lambda *a: case.function(*a, mask=mask), *arguments)
        return y, back(ct)

    return run


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
def test_a_mask_that_leaves_nothing(case):
    x, scale, bias = case.arguments()
    nothing, one_example = np.zeros(SHAPE, bool), np.arange(4)[:, None, None] > 0
    for mask in (nothing, np.broadcast_to(one_example, SHAPE)):
        y, derivatives = masked(case)(mask, cotangent(SHAPE), x, scale, bias)
        assert np.isfinite(y).all()
        assert all(np.isfinite(g).all() for g in derivatives)
    y, _ = masked(case)(nothing, cotangent(SHAPE), x, scale, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias if case.has_bias else 0, SHAPE))


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
def test_what_the_mask_leaves_out_cannot_spoil_the_rest(case):
    x, scale, bias = case.arguments()
    mask = np.ones(SHAPE, bool)
    mask[:, 1, 2:4] = False
    ct = np.where(mask, cotangent(SHAPE), 0)

    def run(outside):
        spoiled = np.where(mask, x, np.asarray(outside, "f"))
        y, derivatives = masked(case)(mask, ct, spoiled, scale, bias)
        return np.asarray(y)[mask], np.asarray(derivatives[0])[mask]

    for got, wanted in zip(run(1e30), run(x)):
        np.testing.assert_array_equal(got, wanted)
    # A NaN too stays out of the value (a zero cotangent times NaN is NaN, as everywhere in JAX).
    np.testing.assert_array_equal(run(np.nan)[0], run(x)[0])


@pytest.mark.parametrize("case", [c for c in FUNCTIONS if c.has_bias], ids=lambda c: c.name)
@pytest.mark.parametrize("value", [0.0, 10000.1, -1e-3, 3e38, 1e-30])
def test_a_constant_slice_gives_exactly_bias(case, value):
    _, scale, bias = case.arguments()
    for dtype in (jnp.float32, jnp.bfloat16):
        x = np.full(SHAPE, value, dtype).astype(np.float32)
        y = jax.jit(case.function)(x, scale, bias)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))


@pytest.mark.parametrize("case", FUNCTIONS, ids=lambda c: c.name)
def test_nan_in_is_nan_out(case):
    x, scale, bias = case.arguments()
    first = np.arange(x.size).reshape(SHAPE) == 0
    for bad in (np.nan, np.inf):
        y = jax.jit(case.function)(np.where(first, np.float32(bad), x), scale, bias)
        assert np.isnan(np.asarray(y)[0, 0, 0])
