"""The tolerances pass right results, and fail a result that lacks a term or rounds once more."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxnorm.testing import (
    assert_close,
    condition_number,
    oracle,
    rounding_units,
    sum_conditioning,
    tolerance,
)

RNG = np.random.default_rng(8)
FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
floats = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: np.dtype(d).name)
EPSILON = 1e-6


def shifted_layer_norm(x):
    """The forward pass for which the budgets are derived, in the dtype of x."""
    d = x - x[:, :1]
    d = d - d.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + x.dtype.type(EPSILON))


def backward(dy, x, *, without=""):
    """LayerNorm's backward in the dtype of x, optionally with one term left out."""
    d = x - x[:, :1]
    d = d - d.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + x.dtype.type(EPSILON))
    xhat = d * rstd
    dx = dy
    if without != "mean":
        dx = dx - dy.mean(-1, keepdims=True)
    if without != "projection":
        dx = dx - xhat * (dy * xhat).mean(-1, keepdims=True)
    return rstd * dx


def draw(rows, length, dtype=np.float32, offset=0.0, deviation=1.0):
    x = (offset + deviation * RNG.normal(size=(rows, length))).astype(dtype)
    return x, RNG.normal(size=(rows, length)).astype(dtype)


@floats
def test_one_unit_is_the_spacing_at_the_desired_value(dtype):
    eps = float(ml_dtypes.finfo(dtype).eps)
    assert rounding_units(np.array([1 + eps], dtype), [1.0]) == 1.0
    assert rounding_units(np.array([eps / 2], dtype), [0.0]) == 0.5
    assert rounding_units([-4 + 4 * eps], [-4.0], dtype) == 1.0
    assert rounding_units([4.0, 4 * eps], [4.0, 0.0], dtype, what="derivative") == 1.0
    assert rounding_units([4.0, 4 * eps], [4.0, 0.0], dtype) == 4.0
    assert rounding_units([0.25], [0.25 + eps / 4], dtype, floor=0.0) == pytest.approx(1.0, rel=0.1)


def test_derivatives_can_be_scaled_slice_by_slice():
    desired = np.array([[1000.0, 0.0], [1.0, 0.0]])
    actual = desired + np.array([[0.0, 0.0], [0.0, 1e-5]])
    whole = rounding_units(actual, desired, np.float32, what="derivative")
    slices = rounding_units(actual, desired, np.float32, what="derivative", axis=1)
    assert slices == pytest.approx(1000 * whole)


@floats
def test_not_a_number_and_infinity(dtype):
    inf, nan = math.inf, math.nan
    assert rounding_units([nan], [nan], dtype) == inf
    assert rounding_units([1.0, nan], [1.0, 1.0], dtype, what="derivative") == inf
    assert rounding_units([1.0], [nan], dtype) == inf
    assert rounding_units([inf], [1.0], dtype) == inf
    assert rounding_units([-inf], [inf], dtype) == inf
    assert rounding_units([1.0], [inf], dtype) == inf
    assert rounding_units([inf, 0.0], [inf, 0.0], dtype, what="derivative") == 0
    largest = float(ml_dtypes.finfo(dtype).max)
    overflow = np.longdouble(largest) * 2
    assert rounding_units(np.array([inf]), np.array([overflow]), dtype) == 0


def test_complex_results_are_judged_by_the_rounding_of_their_parts():
    assert tolerance(np.complex64) == tolerance(np.float32)
    assert rounding_units([3 + 4j + 5e-6], [3 + 4j], np.complex64) == pytest.approx(1e-6 * 2**23)
    assert rounding_units([complex(math.nan, 0)], [0j], np.complex64) == math.inf


def test_tolerance_adds_half_a_unit_for_narrow_results():
    assert tolerance(np.float64, what="derivative") == 64 * 2.0**-52
    assert tolerance(np.float32, conditioning=3.0) == 96 * 2.0**-23
    assert tolerance(np.float16) == 2.0**-11 + 32 * 2.0**-23
    assert tolerance(np.float32, floor=8.0) == 8 * tolerance(np.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tolerance(np.int32), TypeError, "dtype must be a floating"),
        (lambda: tolerance(np.float32, what="gradient"), ValueError, "what must be one of"),  # pyright: ignore[reportArgumentType]
        (lambda: tolerance(np.float32, conditioning=0.5), ValueError, "at least 1"),
        (lambda: tolerance(np.float32, conditioning=math.nan), ValueError, "at least 1"),
        (lambda: assert_close([1.0], [[1.0]], name="dx"), AssertionError, "dx: shapes differ"),
        (lambda: rounding_units([1], [1]), TypeError, "dtype must be a floating"),
    ],
)  # fmt: skip
def test_wrong_calls_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_failure_tells_where_what_and_how_much():
    desired = np.zeros((2, 3))
    actual = desired.astype(np.float32)
    actual[1, 2], actual[0, 1] = 0.5, 0.25
    with pytest.raises(AssertionError) as caught:
        assert_close(actual, desired, what="derivative", conditioning=2.0, name="dx of layer_norm")
    text = str(caught.value)
    for part in (
        "dx of layer_norm: 2 of 6 elements",
        "(derivative, float32)",
        "worst at  (1, 2)",
        "got       0.5\n",
        "wanted    0.0\n",
        "error     0.5 = 4.19e+06 units of 1.19e-07",
        "budget    128 units (conditioning 2)",
    ):
        assert part in text
    assert_close(np.zeros((0, 3), np.float32), np.zeros((0, 3)))


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("length", [2, 3, 64, 1024])
def test_value_budget_passes_shifted_statistics_at_any_offset(length, offset):
    x, _ = draw(32, length, offset=offset)
    assert_close(shifted_layer_norm(x), oracle.layer_norm(x, epsilon=EPSILON), np.float32)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_value_budget_fails_statistics_that_are_not_shifted(offset):
    x, _ = draw(32, 64, offset=offset)
    var = (x * x).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(np.maximum(var, 0) + np.float32(EPSILON))
    with pytest.raises(AssertionError, match="beyond the budget"):
        assert_close(y, oracle.layer_norm(x, epsilon=EPSILON), np.float32)


@pytest.mark.parametrize("deviation", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("length", [1, 2, 3, 64, 1024])
def test_derivative_budget_passes_the_formula_for_any_length_and_deviation(length, deviation):
    x, dy = draw(64, length, deviation=deviation)
    dx, _, _ = oracle.layer_norm_vjp(dy, x, epsilon=EPSILON)
    assert_close(
        backward(dy, x),
        dx,
        np.float32,
        what="derivative",
        conditioning=condition_number(x, -1, EPSILON),
    )


@pytest.mark.parametrize("without", ["mean", "projection"])
@pytest.mark.parametrize("deviation", [1e-3, 1.0])
@pytest.mark.parametrize("length", [3, 64, 1024])
def test_derivative_budget_fails_a_missing_term(length, deviation, without):
    x, dy = draw(64, length, deviation=deviation)
    dx, _, _ = oracle.layer_norm_vjp(dy, x, epsilon=EPSILON)
    wrong = backward(dy, x, without=without)
    with pytest.raises(AssertionError, match="beyond the budget"):
        conditioning = condition_number(x, -1, EPSILON)
        assert_close(wrong, dx, np.float32, what="derivative", conditioning=conditioning)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_results_may_be_rounded_once_but_not_computed_narrow(dtype):
    x, _ = draw(32, 64, dtype)
    scale = RNG.normal(1.0, 0.2, size=64).astype(dtype)
    desired = oracle.rms_norm(x, scale)
    wide = x.astype(np.float32)
    rstd = 1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(1e-6))
    once = (wide * rstd * scale.astype(np.float32)).astype(dtype)
    assert_close(once, desired)
    early = (wide * rstd).astype(dtype) * scale  # the cast before the scale, as in some ports
    with pytest.raises(AssertionError, match="beyond the budget"):
        assert_close(early, desired)
    assert_close(early, desired, roundings=2)


@given(
    st.integers(1, 4),
    st.floats(-6, 3),
    st.floats(-7, 0),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_condition_number_is_that_of_the_matrix(n, size, epsilon, centered, is_complex, seed):
    """|A|, assembled column by column from the oracle, against the derived norms."""
    rng, epsilon = np.random.default_rng(seed), 10.0**epsilon
    x = 10.0**size * rng.normal(size=n) + (
        1j * 10.0**size * rng.normal(size=n) if is_complex else 0
    )
    vjp = oracle.layer_norm_vjp if centered else oracle.rms_norm_vjp
    basis = [*np.eye(n), *(1j * np.eye(n) if is_complex else [])]
    columns = [
        np.concatenate([c.real, c.imag]) for c in (vjp(b, x, epsilon=epsilon)[0] for b in basis)
    ]
    norm = np.linalg.norm(np.array(columns), 2)
    m2 = oracle.moments(x, 0).m2 if centered else np.sum(np.abs(x) ** 2)
    expected = max(1.0, 1 / math.sqrt(m2 / n + epsilon) / max(1.0, norm))
    found = condition_number(x, -1, epsilon, centered=centered)
    assert found == pytest.approx(expected, rel=1e-6)


def test_condition_number_takes_the_worst_slice_and_the_longest_sum():
    x = np.array([[0.0, 1.0, 5.0], [1e-3, 0.0, 9.0]])
    assert condition_number(x, -1, EPSILON) == 1.0
    # Two elements of deviation 5e-4 are left in the second slice.
    var, mask = 2.5e-7, np.array([[1, 1, 1], [1, 1, 0]])
    rstd = 1 / math.sqrt(var + EPSILON)
    expected = rstd / max(1, rstd * EPSILON / (var + EPSILON))
    assert condition_number(x, -1, EPSILON, mask=mask) == pytest.approx(expected)
    assert condition_number(x, -1, EPSILON, terms=4096) == 2.0
    assert condition_number(x, None, EPSILON, mask=np.zeros(3)) == 1.0
    assert condition_number(np.ones((1, 4)), -1, 0.0) == 1.0
    assert sum_conditioning(16 * 1024) == 4.0


@pytest.mark.parametrize("length", [4096, 65536])
def test_sum_conditioning_covers_sums_taken_one_by_one(length):
    terms = np.abs(RNG.normal(size=(length, 16))).astype(np.float32)
    total = np.cumsum(terms, axis=0)[-1]
    units = np.abs(total - terms.sum(0, dtype=np.float64)) / total / np.finfo(np.float32).eps
    assert units.max() <= 32 * sum_conditioning(length)
