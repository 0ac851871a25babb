"""What is compiled for large arrays only, made to run on small ones: the same numbers as ever."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BATCH, GROUP, INSTANCE, LAYER, RMS, cotangent
from compiling import jit_as_users, value_and_vjp

from jaxnorm.core import cpu
from jaxnorm.testing import assert_close, condition_number, oracle

CASES = (BATCH, LAYER, RMS, GROUP, INSTANCE)
SHAPE = (7, 5, 32)
MAX = float(np.finfo(np.float32).max)


@pytest.fixture(autouse=True, scope="module")
def all_are_large():
    jax.clear_caches()  # of what was compiled for these shapes as small ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "LARGE", 0)
        yield
    jax.clear_caches()


def exact(case, suffix, *arguments, **options):
    """What the float64 oracle says, of the value or ("_vjp") of the gradients."""
    options |= {"num_groups": 2} if case is GROUP else {}
    if not case.has_bias:
        arguments = arguments[:-1]
    if case is BATCH:
        features = arguments[-1].shape[-1]
        arguments += np.zeros(features), np.ones(features)
        options["training"] = True
    found = getattr(oracle, case.name + suffix)(*arguments, **options)
    return found[0] if case is BATCH and not suffix else found


def data(shape, offset, deviation, outlier):
    x = np.random.default_rng(0).normal(size=shape) * deviation + offset
    if outlier is not None:
        x[:, shape[1] * outlier // 8, shape[2] * outlier // 8] += 1e4 * deviation
    return x.astype(np.float32)


# Slices long and short, along the last axis and before it; a few for each.
SHAPES = {
    BATCH: ((7, 5, 32), (3, 130, 12)),
    LAYER: ((1, 2, 6), (2, 3, 48)),
    RMS: ((1, 2, 6), (7, 5, 32)),
    GROUP: ((7, 5, 32), (3, 130, 12), (2, 3, 48)),
    INSTANCE: ((3, 130, 12), (1, 2, 6)),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_value(case):
    run = jit_as_users(case.function)
    for shape in SHAPES[case]:
        scale, bias = np.ones(shape[-1], "f"), np.zeros(shape[-1], "f")
        for offset in (0.0, 1.5, 1e4, 1e6):
            for deviation in (1e-6, 1.0):
                for outlier in (None, 0, 4):
                    x = data(shape, offset, deviation, outlier)
                    wanted = exact(case, "", x, scale, bias)
                    name = f"{shape} {offset} {deviation} {outlier}"
                    assert_close(run(x, scale, bias), wanted, name=name)


@cache
def without_epsilon(case):
    """Epsilon hides what is divided by nearly nothing."""
    return value_and_vjp(partial(case.function, epsilon=0.0), jit_as_users)


def parameters_and_cotangent(seed):
    rng = np.random.default_rng(seed)
    return (*(rng.normal(size=(2, 32)) + 1).astype("f"), rng.normal(size=SHAPE).astype("f"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_derivatives(case):
    axes = {BATCH: (0, 1), LAYER: (2,), RMS: (2,)}.get(case, (1,))
    scale, bias, dy = parameters_and_cotangent(1)
    for offset, deviation in ((0, 1), (1e2, 1), (1e4, 1e2), (1, 1e-2), (0, 1e6)):
        x = data(SHAPE, offset, deviation, None)
        conditioning = np.max(
            condition_number(x, axes, 0.0, centered=case is not RMS, terms=x.size)
        )
        _, derivatives = without_epsilon(case)(dy, x, scale, bias)
        wanted = exact(case, "_vjp", dy, x, scale, bias, epsilon=0.0)
        for got, want in zip(derivatives, wanted):
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
        np.testing.assert_allclose(got, wanted, atol=2e-4 * max(1, float(np.abs(wanted).max())))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_extremes(case):
    scale, bias, dy = parameters_and_cotangent(2)

    def run(x):
        y, (dx, *_) = without_epsilon(case)(dy, x.astype(np.float32), scale, bias)
        return np.asarray(y), dx

    rng = np.random.default_rng(0)
    for x in (rng.normal(size=SHAPE) * 1e30, rng.choice([-MAX, MAX], size=SHAPE),
              np.full(SHAPE, MAX), rng.normal(size=SHAPE) * 1e-40,
              np.zeros(SHAPE), np.full(SHAPE, 10000.1)):  # fmt: skip
        y, dx = run(x)
        assert np.isfinite(y).all() and np.isfinite(dx).all()
        if case.has_bias and np.ptp(x) == 0:
            np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    x = data(SHAPE, 0.5, 1.5, None)
    for factor in (1e30, 1e37, 1e-15):
        np.testing.assert_allclose(run(x * np.float32(factor))[0], run(x)[0], atol=2e-5)
    x[0, 0, 0] = np.nan
    bad = run(x)[0]
    assert np.isnan(bad[0, 0, 0])
    if case is GROUP:  # one group of one example
        assert np.isnan(bad).sum() == np.isnan(bad[0, :, :16]).sum()
