"""The monoid, the running statistics, and what `measure` does with a bad guess."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import equations
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxnorm
from jaxnorm import BatchStats, Moments
from jaxnorm.core.measure import Measurement, Strategy, Way, measure
from jaxnorm.core.normalize import standardize
from jaxnorm.core.slices import Slices
from jaxnorm.testing import assert_close, oracle

# Of few sizes: each, and the sum of any two, is a program.
numbers = st.sampled_from((0, 1, 7)).flatmap(
    lambda size: st.lists(st.floats(-1e6, 1e6, width=32), min_size=size, max_size=size)
)
merge = jax.jit(Moments.merge)


def taken(values) -> Moments:
    if not values:
        return Moments.empty()
    return jaxnorm.moments(jnp.asarray(values, jnp.float32), 0)


def close(a: Moments, b: Moments, size: float):
    np.testing.assert_allclose(a.count, b.count)
    np.testing.assert_allclose(a.mean, b.mean, atol=2e-6 * size)
    np.testing.assert_allclose(a.m2, b.m2, atol=2e-5 * size**2, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers, numbers)
def test_merge_is_a_commutative_monoid(a, b, c):
    size = max(1.0, *map(abs, a + b + c)) if a + b + c else 1.0
    x, y, z = taken(a), taken(b), taken(c)
    close(merge(x, y), merge(y, x), size)
    close(merge(merge(x, y), z), merge(x, merge(y, z)), size)
    close(merge(x, Moments.empty()), x, size)
    close(merge(x, y), taken(a + b), size)


def test_merge_of_huge_numbers():
    huge = taken([1e30, 1.0000001e30])
    for merged in (huge.merge(Moments.empty()), Moments.empty().merge(huge)):
        assert all(a == b for a, b in zip(merged, huge))
    for value in (1e30, 3e38):
        merged = taken([value, value]).merge(taken([-value]))
        np.testing.assert_allclose(merged.mean, value / 3, rtol=1e-6)
        assert np.isfinite(merged.m2)


def test_merge_where_a_mean_of_variances_is_wrong():
    whole = taken([-1.0, 1.0]).merge(taken([9.0, 11.0]))
    assert (whole.count, whole.mean, whole.var) == (4, 5, 26)


@pytest.mark.sample
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (0, 1, 2)])
def test_moments_against_the_oracle(axis):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, 6, 7)) + 1e4, jnp.float32)
    mask = rng.random((5, 6, 1)) < 0.5
    run = jax.jit(lambda x, mask: [jaxnorm.moments(x, axis, mask=m) for m in (None, mask)])
    for got, m in zip(run(x, mask), (None, mask)):
        wanted = oracle.moments(np.asarray(x), axis, mask=m)
        assert got.mean.shape == wanted.mean.shape
        np.testing.assert_array_equal(got.count, wanted.count)
        np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-7)
        np.testing.assert_allclose(got.m2, wanted.m2, rtol=2e-6, atol=1e-4)


def test_moments_can_be_differentiated():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 50)) + 100, jnp.float32)
    dmean, dm2 = np.arange(1, 5, dtype="f"), np.arange(2, 6, dtype="f")

    @jax.jit
    def run(x, *cotangents):
        return jax.vjp(lambda x: jaxnorm.moments(x, -1), x)[1](Moments(*cotangents))[0]

    got = run(x, np.zeros(4, "f"), dmean, dm2)
    wanted = oracle.moments_vjp(dmean, dm2, np.asarray(x), -1)
    assert_close(got, wanted, what="derivative", floor=float(np.abs(wanted).max()))


def test_the_guess_changes_nothing_but_the_time():
    x = (np.random.default_rng(2).normal(size=(64, 3)) + 7).astype("f")
    wanted = oracle.batch_norm(x, None, None, np.zeros(3), np.ones(3), training=True)[0]
    run = jax.jit(lambda x, g: standardize(Measurement(Slices((0,)), 1e-5), x, None, g)[0])
    for offset in (0.0, 3.0, 1e4, -1e6, 1e30):
        assert_close(run(x, np.full((1, 3), offset, "f")), wanted, name=f"{offset}")


def test_a_good_guess_costs_one_read():
    """The second measurement stands in a branch, also under vmap: `cond`, not `select`."""
    x = jnp.ones((3, 8, 4))
    arguments = Measurement(Slices((0,))), Strategy(Way.GUESS)
    run = jax.vmap(lambda x: measure(*arguments, x, None, jnp.zeros((1, 4))))
    (choice,) = (e for e in equations(jax.make_jaxpr(run)(x)) if e.primitive.name == "cond")
    reads = [
        sum(e.primitive.name.startswith("reduce_sum") for e in equations(branch))
        for branch in choice.params["branches"]
    ]
    assert min(reads) == 0 < max(reads)


def stats(mean, var, count=0):
    return BatchStats(*(jnp.asarray(np.full(2, a, "f")) for a in (mean, var)), jnp.int32(count))


@pytest.mark.sample
@pytest.mark.parametrize(
    "options",
    [
        {}, {"decay": 0.5}, {"decay": 0.0}, {"decay": 1.0}, {"decay": None}, {"debias": True},
        {"debias": True, "decay": 0.9}, {"debias": True, "decay": 1.0}, {"unbiased": True},
    ],
    ids=str,
)  # fmt: skip
def test_running_statistics_against_the_oracle(options):
    rng = np.random.default_rng(3)
    new, wanted = stats(3.0, 2.0), (np.full(2, 3.0), np.full(2, 2.0), 0)
    run = jax.jit(lambda x, old: jaxnorm.batch_norm(x, None, None, old, training=True, **options))
    for i in range(4):
        x = (rng.normal(size=(5, 2)) * 2 + 1).astype("f")
        _, new = run(x, new)
        _, wanted = oracle.batch_norm(
            x, None, None, *wanted[:2], count=wanted[2], training=True, **options
        )
        np.testing.assert_allclose(new.mean, wanted[0], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(new.var, wanted[1], rtol=2e-5)
        assert int(new.count) == int(wanted[2]) == i + 1


def test_decay_may_be_a_schedule():
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 2)), jnp.float32)
    run = jax.jit(
        lambda d: jaxnorm.batch_norm(x, None, None, stats(0.0, 1.0), training=True, decay=d)
    )
    for decay in (0.3, 0.8):
        fixed = jaxnorm.batch_norm(x, None, None, stats(0.0, 1.0), training=True, decay=decay)
        np.testing.assert_allclose(run(jnp.float32(decay))[1].var, fixed[1].var, rtol=1e-6)


def test_features_that_the_mask_leaves_out_keep_their_statistics():
    @jax.jit
    def run(mask):
        x = jnp.full((4, 2), 9.0)
        return jaxnorm.batch_norm(x, None, None, stats(3.0, 2.0), training=True, mask=mask)[1]

    (mean, other_mean), (_, other_var), _ = map(np.asarray, run(np.array([[True, False]])))
    assert other_mean == 3 and other_var == 2 and mean > 3
    new = run(np.array([[False, False]]))
    assert int(new.count) == 0
    np.testing.assert_array_equal(new.mean, [3, 3])


def test_running_statistics_carry_no_gradient():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(5, 2)), jnp.float32)

    def total(x, mean, training):
        old = stats(0.0, 1.0)._replace(mean=mean)
        y, new = jaxnorm.batch_norm(x, None, None, old, training=training)
        return (new.mean + new.var).sum() if training else (y**2).sum()

    @jax.jit
    def gradients(x, mean):
        of_mean = (jax.grad(total, argnums=1)(x, mean, training) for training in (True, False))
        return jax.grad(total)(x, mean, True), *of_mean

    for gradient in gradients(x, np.ones(2, "f")):
        np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", ["float32", "float64"])
def test_evaluation_computes_in_the_wider_dtype(dtype, x_dtype):
    rng = np.random.default_rng(7)
    with jax.enable_x64(x_dtype == "float64"):
        x = rng.normal(size=(6, 2)).astype(x_dtype)
        mean, var = ((rng.random(2) + 0.5).astype(dtype) for _ in range(2))
        old = BatchStats(mean, var, np.int32(0))
        y = jax.jit(lambda *a: jaxnorm.batch_norm(*a, training=False)[0])(x, None, None, old)
        wide = mean.astype(np.float64), var.astype(np.float64)
        assert_close(y, oracle.batch_norm(x, None, None, *wide, training=False)[0])


def test_small_steps_add_up_in_half_precision():
    start = jaxnorm.init_batch_stats(2, jnp.bfloat16)
    _, new = jaxnorm.batch_norm(
        jnp.asarray(np.full((4, 2), 1e3, "f")), None, None, start, training=True, decay=0.999
    )
    np.testing.assert_allclose(new.mean.astype("f"), 1.0, rtol=1e-2)


def test_evaluation_returns_the_statistics_it_was_given():
    old = stats(1.0, 4.0, 7)
    y, new = jaxnorm.batch_norm(jnp.full((3, 2), 5.0), None, None, old, training=False)
    np.testing.assert_allclose(y, 2.0, rtol=1e-5)
    for a, b in zip(new, old):
        np.testing.assert_array_equal(a, b)


def test_huge_data_leaves_finite_statistics():
    x = jnp.asarray(np.random.default_rng(6).normal(size=(8, 2)) * 1e30, jnp.float32)

    @jax.jit
    def run(x):
        _, new = jaxnorm.batch_norm(x, None, None, stats(0.0, 1.0), training=True)
        return new.mean, new.var, jaxnorm.moments(x, 0).m2

    assert all(np.isfinite(a).all() for a in run(x))
