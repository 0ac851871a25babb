"""What is compiled for large arrays only, made to run on small ones: the same numbers as ever."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, GROUP, INSTANCE, LAYER, RMS, cotangent
from compiling import jit_as_users

from jaxnorm.core import slices
from jaxnorm.testing import assert_close, condition_number, oracle

CASES = (BATCH, LAYER, RMS, GROUP, INSTANCE)
MAX = float(np.finfo(np.float32).max)


@pytest.fixture(autouse=True, scope="module")
def all_are_large():
    jax.clear_caches()  # of what was compiled for these shapes as small ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "LARGE", 0)
        yield
    jax.clear_caches()


def exact(case, suffix, *arguments):
    """What the float64 oracle says, of the value or ("_vjp") of the gradients."""
    options = {"num_groups": 2} if case is GROUP else {}
    if not case.has_bias:
        arguments = arguments[:-1]
    if case is BATCH:
        features = arguments[-1].shape[-1]
        arguments += np.zeros(features), np.ones(features)
        options = {"training": True}
    found = getattr(oracle, case.name + suffix)(*arguments, **options)
    return found[0] if case is BATCH and not suffix else found


def data(shape, offset, deviation, outlier):
    x = np.random.default_rng(0).normal(size=shape) * deviation + offset
    if outlier is not None:
        x[:, shape[1] * outlier // 8, shape[2] * outlier // 8] += 1e4 * deviation
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_value(case):
    run = jit_as_users(case.function)
    for shape in ((7, 5, 32), (3, 130, 12), (1, 2, 6), (2, 3, 48)):
        scale, bias = np.ones(shape[-1], "f"), np.zeros(shape[-1], "f")
        for offset in (0.0, 1.5, 1e4, 1e6):
            for deviation in (1e-6, 1.0):
                for outlier in (None, 0, 4):
                    x = data(shape, offset, deviation, outlier)
                    wanted = exact(case, "", np.asarray(x), scale, bias)
                    name = f"{shape} {offset} {deviation} {outlier}"
                    assert_close(run(x, scale, bias), wanted, name=name)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_derivatives(case):
    shape, rng = (7, 5, 32), np.random.default_rng(1)
    axes = {BATCH: (0, 1), LAYER: (2,), RMS: (2,)}.get(case, (1,))
    scale, bias = (rng.normal(size=(2, 32)) + 1).astype("f")
    dy = rng.normal(size=shape).astype("f")
    run = jit_as_users(lambda x, dy: jax.vjp(case.function, x, scale, bias)[1](dy))
    for offset, deviation in ((0, 1), (1e2, 1), (1e4, 1e2), (1, 1e-2), (0, 1e6)):
        x = data(shape, offset, deviation, None)
        conditioning = np.max(
            condition_number(np.asarray(x), axes, 1e-6, centered=case is not RMS, terms=x.size)
        )
        wanted = exact(case, "_vjp", dy, np.asarray(x), scale, bias)
        for got, want in zip(run(x, dy), wanted):
            floor = min(1.0, float(np.abs(want).max()))
            assert_close(
                got, want, what="derivative", floor=floor, conditioning=float(conditioning),
                name=f"{offset} {deviation}",
            )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_second_derivatives_in_both_modes(case):
    arguments, ct = case.arguments(), cotangent(case.shape)

    @partial(jax.jit, static_argnums=0)
    def second(function):
        def gradient(*a):
            return jax.grad(lambda *a: jnp.vdot(function(*a), ct), argnums=(0, 1))(*a)

        forward = jax.jvp(gradient, arguments, arguments)[1]
        reverse = jax.vjp(gradient, *arguments)[1](arguments[:2])
        return forward, reverse

    for got, wanted in zip(*map(jax.tree.leaves, (second(case.function), second(case.plain)))):
        np.testing.assert_allclose(got, wanted, atol=2e-4 * max(1, float(jnp.abs(wanted).max())))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_extremes(case):
    _, scale, bias = case.arguments()
    ct = cotangent(case.shape)

    @jit_as_users
    def run(x):
        y, back = jax.vjp(lambda x: case.function(x, scale, bias, epsilon=0.0), x)
        return y, back(ct)[0]

    rng = np.random.default_rng(0)
    for x in (rng.normal(size=case.shape) * 1e30, rng.choice([-MAX, MAX], size=case.shape),
              np.full(case.shape, MAX), rng.normal(size=case.shape) * 1e-40,
              np.zeros(case.shape), np.full(case.shape, 10000.1)):  # fmt: skip
        y, dx = run(jnp.asarray(x, jnp.float32))
        assert np.isfinite(y).all() and np.isfinite(dx).all()
        if case.has_bias and np.ptp(x) == 0:
            np.testing.assert_array_equal(y, jnp.broadcast_to(bias, case.shape))
    x = case.arguments()[0]
    for factor in (1e30, 1e37, 1e-15):
        np.testing.assert_allclose(run(x * factor)[0], run(x)[0], atol=2e-5)
    bad = run(x.at[0, 0, 0].set(jnp.nan))[0]
    assert np.isnan(bad[0, 0, 0])
    if case is GROUP:  # one group of one example
        assert np.isnan(bad).sum() == np.isnan(bad[0, :, :3]).sum()
