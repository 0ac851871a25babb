"""The oracle on inputs for which no library is right: empty, constant, far away, merged."""

import math
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnorm.testing import assert_close, oracle

RNG = np.random.default_rng(7)
STATELESS = {
    "layer_norm": {},
    "rms_norm": {},
    "group_norm": {"num_groups": 2},
    "instance_norm": {},
}
stateless = pytest.mark.parametrize("name", STATELESS)


def exact_moments(values):
    """Mean and variance in rational arithmetic, rounded once."""
    fractions = [Fraction(float(v)) for v in values]
    mean = sum(fractions) / len(fractions)
    return mean, sum((f - mean) ** 2 for f in fractions) / len(fractions), fractions


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    ("offset", "deviation"), [(0.0, 1.0), (1e6, 1.0), (1e6, 1e-6), (-1e12, 1e3), (1e-300, 1e-300)]
)
def test_standardization_is_exact_at_any_offset(offset, deviation, dtype):
    with np.errstate(under="ignore"):
        x = (offset + deviation * RNG.normal(size=50)).astype(dtype)
    mean, var, fractions = exact_moments(x)
    if var == 0:  # float32 does not resolve the deviation: a constant slice
        np.testing.assert_array_equal(oracle.layer_norm(x, epsilon=0.0), np.zeros(50))
        return
    # The root of a fraction to 1e-60: scaled up to an integer first.
    root = Fraction(math.isqrt(int(var * 10**1400)), 10**700)
    desired = np.array([float((f - mean) / root) for f in fractions])
    units = np.abs(oracle.layer_norm(x, epsilon=0.0) - desired) / np.finfo(np.float64).eps
    # float32 data are computed in float64; float64 data in longdouble, then rounded: one unit,
    # where there is a longdouble.
    extended = dtype == np.float64 and np.finfo(np.longdouble).eps < np.finfo(np.float64).eps
    assert np.max(units / np.maximum(1, np.abs(desired))) <= (1 if extended else 32)


@stateless
@pytest.mark.parametrize("value", [0.0, 10000.1, 1e30, 1e-40, -3e38])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_constant_slice_is_exactly_bias_with_finite_derivatives(name, value, epsilon):
    shape, bias = (2, 77, 6), RNG.normal(size=6)
    x = np.full(shape, value, np.float32)
    options = STATELESS[name] | {"epsilon": epsilon}
    if name == "rms_norm":  # not centered: a constant slice is ordinary unless it is zero
        y = oracle.rms_norm(x, **options)
        expected = (
            0.0
            if value == 0
            else np.float64(np.float32(value))
            / np.hypot(np.float64(np.float32(value)), np.sqrt(epsilon))
        )
        np.testing.assert_allclose(y, expected, rtol=1e-14)
    else:
        y = getattr(oracle, name)(x, np.ones(6), bias, **options)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, shape))
    dx = getattr(oracle, name + "_vjp")(RNG.normal(size=shape), x, **options)[0]
    assert np.all(np.isfinite(dx))
    if epsilon == 0 and (name != "rms_norm" or value == 0):
        np.testing.assert_array_equal(dx, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("length", [3, 7, 1000, 77777])
def test_moments_of_constants_are_exact(length, dtype):
    constants = 10.0 ** RNG.uniform(-30, 30, size=4) * (1 - 0.3j)
    constants = (constants if np.iscomplexobj(dtype(0)) else constants.real).astype(dtype)
    x = np.broadcast_to(constants, (length, 4))
    for mask in (None, RNG.random(x.shape) < 0.7):
        _, mean, m2 = oracle.moments(x, 0, mask=mask)
        kept = np.ones(4, bool) if mask is None else mask.any(0)
        np.testing.assert_array_equal(m2, 0)
        np.testing.assert_array_equal(mean, np.where(kept, constants, 0))


@stateless
def test_masked_out_elements_change_no_moment_and_get_normalized(name):
    x, mask = RNG.normal(size=(2, 7, 6)), RNG.random((2, 7, 6)) < 0.6
    other = np.where(mask, x, 1e6 * RNG.normal(size=x.shape))
    options = STATELESS[name] | {"mask": mask.astype(ml_dtypes.bfloat16)}
    y, y_other = (getattr(oracle, name)(a, **options) for a in (x, other))
    np.testing.assert_array_equal(y[mask], y_other[mask])
    # One affine map per slice takes x to y, at masked-out positions too.
    if name in ("layer_norm", "rms_norm"):
        slope = (y[..., 1:] - y[..., :1]) / (x[..., 1:] - x[..., :1])
        np.testing.assert_allclose(slope, np.broadcast_to(slope[..., :1], slope.shape), rtol=1e-10)


@stateless
def test_slice_that_is_all_masked_out_gives_bias_and_no_derivative(name):
    x = RNG.normal(size=(2, 7, 6))
    mask = np.ones((2, 1, 1))
    mask[1] = 0
    options = STATELESS[name] | {"mask": mask}
    y = getattr(oracle, name)(x, **options)
    dy = RNG.normal(size=x.shape)
    dx = getattr(oracle, name + "_vjp")(dy, x, **options)[0]
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_array_equal(dx[1], 0)
    alone = getattr(oracle, name)(x[:1], **STATELESS[name])
    np.testing.assert_array_equal(y[:1], alone)
    assert np.abs(dx[0]).max() > 0.1


def test_slices_of_one_element_are_bias_and_empty_ones_hide_what_they_hold():
    x, bias, dy = RNG.normal(size=(3, 4)), RNG.normal(size=4), RNG.normal(size=(3, 4))
    np.testing.assert_array_equal(
        oracle.instance_norm(x, None, bias), np.broadcast_to(bias, x.shape)
    )
    dx, _, dbias = oracle.instance_norm_vjp(dy, x, None, bias)
    np.testing.assert_array_equal(dx, 0)
    np.testing.assert_allclose(dbias, dy.sum(0), rtol=1e-14)
    x[1] = np.inf, np.nan, -np.inf, 1.0
    y = oracle.layer_norm(x, None, bias, mask=[[1], [0], [1]])
    np.testing.assert_array_equal(y[1], bias)
    assert np.all(np.isfinite(y))


@given(st.floats(0.1, 1e3), st.floats(-1e3, 1e3), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_invariant_under_affine_maps_and_derivative_orthogonal_to_them(factor, offset, seed):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, 3, 8))
    y = oracle.layer_norm(x, epsilon=0.0)
    # The map rounds x itself, by up to eps * |offset| / factor of its deviation.
    magnified = 1 + abs(offset) / factor
    moved = oracle.layer_norm(factor * x + offset, epsilon=0.0)
    assert_close(moved, y, np.float64, conditioning=magnified)
    dx, _, _ = oracle.layer_norm_vjp(dy, x, epsilon=0.0)
    zero = np.zeros(3)
    assert_close(dx.sum(-1), zero, np.float64, what="derivative")
    assert_close((dx * x).sum(-1), zero, np.float64, what="derivative")


def running(batches, start, **options):
    stats = oracle.RunningStats(np.full(2, start), np.full(2, start), 0)
    for batch in batches:
        _, stats = oracle.batch_norm(
            batch, None, None, stats.mean, stats.var, training=True, count=stats.count, **options
        )
    return stats


def test_running_statistics_follow_their_closed_forms():
    batches = RNG.normal(2.0, 3.0, size=(6, 9, 2))
    means, variances = batches.mean(1), batches.var(1)
    decay, steps = 0.8, len(batches)
    weights = (1 - decay) * decay ** np.arange(steps - 1, -1, -1)
    plain = running(batches, 5.0, decay=decay)
    np.testing.assert_allclose(plain.mean, decay**steps * 5.0 + weights @ means, rtol=1e-13)
    np.testing.assert_allclose(plain.var, decay**steps * 5.0 + weights @ variances, rtol=1e-13)
    adam = weights / (1 - decay**steps)
    for start in (0.0, 5.0):  # independent of where it starts
        corrected = running(batches, start, decay=decay, debias=True)
        np.testing.assert_allclose(corrected.mean, adam @ means, rtol=1e-13)
        np.testing.assert_allclose(corrected.var, adam @ variances, rtol=1e-13)
        average = running(batches, start, decay=None, unbiased=True)
        np.testing.assert_allclose(average.mean, means.mean(0), rtol=1e-13)
        np.testing.assert_allclose(average.var, batches.var(1, ddof=1).mean(0), rtol=1e-13)
        limit = running(batches, start, decay=1.0, debias=True)
        np.testing.assert_allclose(limit.mean, means.mean(0), rtol=1e-13)
    assert plain.count == corrected.count == average.count == steps
    near_one = running(batches, 5.0, decay=1 - 1e-12, debias=True)
    np.testing.assert_allclose(near_one.mean, means.mean(0), rtol=1e-10)


def test_features_without_elements_keep_their_statistics():
    x = RNG.normal(size=(4, 2))
    old_mean, old_var = np.array([3.0, 4.0]), np.array([5.0, 6.0])
    options = {"training": True, "decay": 0.5, "count": 7}
    y, stats = oracle.batch_norm(x, None, None, old_mean, old_var, mask=[1, 0], **options)
    np.testing.assert_array_equal(y[:, 1], 0)
    assert (stats.mean[1], stats.var[1], stats.count) == (4.0, 6.0, 8)
    np.testing.assert_allclose(stats.mean[0], 1.5 + x[:, 0].mean() / 2, rtol=1e-14)
    _, stats = oracle.batch_norm(x, None, None, old_mean, old_var, mask=False, **options)
    assert stats.count == 7
    np.testing.assert_array_equal(stats.mean, old_mean)
    _, stats = oracle.batch_norm(x[:1], None, None, old_mean, old_var, unbiased=True, **options)
    np.testing.assert_array_equal(stats.var, old_var / 2)  # one element: n - 1 is taken as 1


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_merge_equals_moments_of_the_union(offset, is_complex):
    x = offset + RNG.normal(size=(30, 3)) + (1j * RNG.normal(size=(30, 3)) if is_complex else 0)
    mask = RNG.random(x.shape) < 0.5
    mask[:8] = False
    whole = oracle.moments(x, 0, mask=mask)
    parts = [oracle.moments(x[r], 0, mask=mask[r]) for r in np.split(np.arange(30), [8, 9, 20])]
    a, b, c, d = parts
    assert not a.count.any() and not a.mean.any() and not a.m2.any()
    left = oracle.merge(oracle.merge(oracle.merge(a, b), c), d)
    right = oracle.merge(a, oracle.merge(b, oracle.merge(c, d)))
    for merged in (left, right):
        np.testing.assert_array_equal(merged.count, whole.count)
        assert_close(merged.mean, whole.mean, np.float64)
        # Means of parts were rounded to float64, relative to the offset.
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-13 * max(1.0, offset * 1e-2))
    nothing = oracle.merge(a, a)
    assert not nothing.count.any() and not nothing.m2.any()
    for ours, same in zip(oracle.merge(a, d), d, strict=True):
        np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_low_precision_inputs_are_computed_as_they_stand(dtype):
    x, scale = (RNG.normal(size=s).astype(dtype) for s in ((3, 8), (8,)))
    y = oracle.layer_norm(jnp.asarray(x), scale)
    np.testing.assert_allclose(
        y, oracle.layer_norm(x.astype(np.float64), scale.astype(np.float64)), rtol=1e-12, atol=1e-14
    )
    dx, dscale, dbias = oracle.layer_norm_vjp(x, x, scale)
    assert y.dtype == dx.dtype == np.float64 and dscale is not None and dbias is None
    assert oracle.layer_norm(x.astype(np.longdouble)).dtype == np.longdouble
    assert oracle.layer_norm(x.astype(np.complex64)).dtype == np.complex128


@pytest.mark.parametrize("gain_shape", [(), (1,), (4,), (2, 1), (1, 4), (2, 4)])
def test_gain_broadcasts_and_its_cotangent_has_its_shape(gain_shape):
    kernel, dw = RNG.normal(size=(2, 3, 2, 4))
    gain = RNG.normal(size=gain_shape)
    full = np.broadcast_to(gain, (2, 4))
    w = oracle.standardize_weight(kernel, gain, axis=0)
    np.testing.assert_array_equal(w, oracle.standardize_weight(kernel, full, axis=0))
    dkernel, dgain = oracle.standardize_weight_vjp(dw, kernel, gain, axis=0)
    expected, _ = oracle.standardize_weight_vjp(dw, kernel, full, axis=0)
    np.testing.assert_array_equal(dkernel, expected)
    assert dgain is not None and dgain.shape == gain_shape
    # The gain is linear: the derivative along itself is the value.
    np.testing.assert_allclose(np.sum(dgain * gain), np.sum(dw * w), rtol=1e-12)


X = np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: oracle.layer_norm(X, np.ones(3)), r"scale must have .* \(4,\); got \(3,\)"),
        (lambda: oracle.layer_norm(X, bias=np.ones((4, 1))), r"bias must have"),
        (lambda: oracle.layer_norm(X, axis=3), r"axis must hold distinct axes"),
        (lambda: oracle.layer_norm(X, axis=(2, -1)), r"axis must hold distinct axes"),
        (lambda: oracle.layer_norm(X, mask=np.ones(3)), r"mask must broadcast"),
        (lambda: oracle.layer_norm(X, epsilon=-1.0), r"epsilon must be"),
        (lambda: oracle.layer_norm_vjp(np.ones(4), X), r"cotangent must have the shape of x"),
        (lambda: oracle.group_norm(X, num_groups=3), r"num_groups must divide the 4"),
        (lambda: oracle.group_norm(X, num_groups=0), r"num_groups must divide the 4"),
        (lambda: oracle.group_norm(X, num_groups=2, axis=1), r"must include the feature axis 2"),
        (lambda: oracle.group_norm(X, num_groups=2, feature_axis=0), r"must include .* axis 0"),
        (lambda: oracle.standardize_weight(X, np.ones(3)), r"gain must broadcast"),
        (lambda: oracle.moments_vjp(X, X, X, 0), r"dmean must have the shape"),
        (
            lambda: oracle.batch_norm(
                X, None, None, np.zeros(4), np.ones(4), training=True, decay=1.1
            ),
            r"decay must lie in \[0, 1\]",
        ),
    ],
)
def test_wrong_calls_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_arrays_without_numbers_are_refused():
    with pytest.raises(TypeError, match="layer_norm: arrays must hold numbers"):
        oracle.layer_norm(np.array(["1", "2"]))
