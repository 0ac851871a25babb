"""Value and derivatives against the float64 oracle: any offset, spread, dtype, layout, outlier."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import in_kernels
from compiling import jit_as_users, value_and_vjp

import jaxnorm
from jaxnorm.testing import assert_close, condition_number, oracle

pytestmark = pytest.mark.usefixtures("ways_to_measure")

OFFSETS = (0.0, 1.0, 1e2, 1e4, 1e6)
DEVIATIONS = (1e-6, 1e-3, 1.0, 1e3, 1e6)
OUTLIERS = (None, "first element", "first slice", "middle", "last")


def _batch(x, scale, bias, mask=None, feature_axis=-1):
    stats = jaxnorm.init_batch_stats(x.shape[feature_axis])
    return jaxnorm.batch_norm(
        x, scale, bias, stats, training=True, mask=mask, feature_axis=feature_axis
    )[0]


def _oracle_batch(x, scale, bias, mask=None, feature_axis=-1):
    n = x.shape[feature_axis]
    return oracle.batch_norm(
        x, scale, bias, np.zeros(n), np.ones(n), training=True, mask=mask, feature_axis=feature_axis
    )[0]


def _oracle_batch_vjp(dy, x, scale, bias, mask=None, feature_axis=-1):
    n = x.shape[feature_axis]
    return oracle.batch_norm_vjp(
        dy, x, scale, bias, np.zeros(n), np.ones(n), training=True, mask=mask,
        feature_axis=feature_axis,
    )  # fmt: skip


def _no_bias(function):
    return lambda x, scale, bias, **options: function(x, scale, **options)


def _no_bias_vjp(function):
    return lambda dy, x, scale, bias, **options: function(dy, x, scale, **options)


# function, oracle, its backward, reduced axes of a rank 3 array with features last, epsilon
FUNCTIONS = {
    "batch": (_batch, _oracle_batch, _oracle_batch_vjp, (0, 1), 1e-5),
    "layer": (jaxnorm.layer_norm, oracle.layer_norm, oracle.layer_norm_vjp, (2,), 1e-6),
    "rms": (
        _no_bias(jaxnorm.rms_norm),
        _no_bias(oracle.rms_norm),
        _no_bias_vjp(oracle.rms_norm_vjp),
        (2,),
        1e-6,
    ),
    "group": (
        lambda *a, **o: jaxnorm.group_norm(*a, num_groups=3, **o),
        lambda *a, **o: oracle.group_norm(*a, num_groups=3, **o),
        lambda *a, **o: oracle.group_norm_vjp(*a, num_groups=3, **o),
        (1,),
        1e-6,
    ),
    "instance": (jaxnorm.instance_norm, oracle.instance_norm, oracle.instance_norm_vjp, (1,), 1e-6),
}
SHAPES = ((7, 5, 33), (3, 130, 12), (1, 2, 6))


def data(shape, dtype, offset, deviation, outlier, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * deviation + offset
    far = 1e4 * deviation
    if outlier == "first element":
        x.reshape(-1)[0] += far
    elif outlier == "first slice":
        x[0] += far
    elif outlier == "middle":
        x[:, shape[1] // 2, shape[2] // 2] += far
    elif outlier == "last":
        x[..., -1] -= far
    limit = float(jnp.finfo(dtype).max)
    return np.clip(x, -limit, limit).astype(dtype)


def found(name):
    """The row of that norm, whose function may be computed by kernels."""
    name, _, kernel = name.partition(" ")
    function, *rest = FUNCTIONS[name]
    return in_kernels(function) if kernel else function, *rest


# Kernels run in Pallas's interpreter, slowly, and as in no user's program; they compute in float32.
# Norm, dtype and how many of the shapes: all are measured and rounded by the same functions.
VALUES = [
    ("batch", "float32", 3), ("layer", "float32", 2), ("rms", "float32", 2),
    ("group", "float32", 3), ("instance", "float32", 3),
    *((name, "bfloat16", 1) for name in ("batch", "layer", "group")),
    *((name, "float16", 1) for name in ("rms", "instance")),
    *((name, "float64", 1) for name in ("batch", "rms", "group")),
    ("layer kernel", "bfloat16", 1), ("layer kernel", "float32", 1), ("rms kernel", "float32", 1),
    ("group kernel", "bfloat16", 1), ("instance kernel", "float32", 1),
]  # fmt: skip
DERIVATIVES = [
    *((name, "float32") for name in FUNCTIONS),
    *((name, "bfloat16") for name in ("layer", "group")),
    *((name, "float64") for name in ("batch", "rms", "instance")),
    ("layer kernel", "float32"), ("rms kernel", "bfloat16"), ("group kernel", "float32"),
    ("instance kernel", "bfloat16"),
]  # fmt: skip


@pytest.mark.sample
@pytest.mark.parametrize(("name", "dtype", "shapes"), VALUES)
def test_value(name, dtype, shapes):
    function, reference, *_ = found(name)
    with jax.enable_x64(dtype == "float64"):
        jit = jax.jit if "kernel" in name else jit_as_users
        run = jit(lambda x: function(x, None, None))
        for shape in SHAPES[:shapes]:
            for offset in OFFSETS:
                for deviation in DEVIATIONS:
                    for outlier in OUTLIERS:
                        x = data(shape, dtype, offset, deviation, outlier)
                        y = run(x)
                        assert y.dtype == x.dtype
                        assert_close(
                            y, reference(x, None, None), dtype,
                            name=f"{name} {shape} {offset} {deviation} {outlier}",
                        )  # fmt: skip


@pytest.mark.sample
@pytest.mark.parametrize(("name", "dtype"), DERIVATIVES)
def test_derivatives(name, dtype):
    function, _, backward, axes, epsilon = found(name)
    rng = np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):

        @(jax.jit if "kernel" in name else jit_as_users)
        def run(x, scale, bias, dy):
            return jax.vjp(function, x, scale, bias)[1](dy)

        shape = SHAPES[0]
        scale, bias = ((rng.normal(size=shape[-1]) + 1).astype(dtype) for _ in range(2))
        dy = rng.normal(size=shape).astype(dtype)
        for offset, deviation in ((0, 1), (1e2, 1), (1e4, 1e2), (1e6, 1e3), (1, 1e-2), (0, 1e6)):
            x = data(shape, dtype, offset, deviation, None)
            if np.ptp(x.astype(np.float64), axis=axes).min() == 0:
                continue  # rounded to one value: nothing well-conditioned is left
            conditioning = condition_number(x, axes, epsilon, centered=name != "rms", terms=x.size)
            wanted = backward(dy, x, scale, bias)
            for what, got, want in zip(("dx", "dscale", "dbias"), run(x, scale, bias, dy), wanted):
                assert got.dtype == dtype
                # Derivatives with respect to x scale with 1 / deviation: measure them so.
                floor = min(1.0, float(np.abs(want).max()))
                assert_close(
                    got, want, dtype, what="derivative", floor=floor,
                    conditioning=float(np.max(conditioning)),
                    name=f"{name} {what} {offset} {deviation}",
                )  # fmt: skip


@pytest.mark.sample
@pytest.mark.parametrize(
    ("name", "mask_shape"),
    [(name, shape) for name in FUNCTIONS for shape in ((7, 5, 33), (7, 1, 1))]
    # Other masks broadcast along the axes whose elements these count, or fold into groups.
    + [(name, shape) for name in ("batch", "group") for shape in ((5, 1), (7, 5, 1), (1, 1, 33))],
)
def test_masks(name, mask_shape):
    function, reference, backward, *_ = FUNCTIONS[name]
    rng = np.random.default_rng(2)
    mask = rng.random(mask_shape) < 0.6
    x = data(SHAPES[0], "float32", 3e3, 1.0, None)
    scale, bias = ((rng.normal(size=33) + 1).astype("f") for _ in range(2))
    dy = rng.normal(size=x.shape).astype("f")

    @jax.jit
    def run(mask, dy, *arguments):
        y, back = jax.vjp(lambda *a: function(*a, mask=mask), *arguments)
        return y, back(dy)

    y, derivatives = run(mask, dy, x, scale, bias)
    wanted = reference(x, scale, bias, mask=mask)
    # Where one element is left its neighbours are thousands of deviations away: relative to that.
    assert_close(y, wanted, floor=float(np.abs(wanted).max()))
    for got, want in zip(derivatives, backward(dy, x, scale, bias, mask=mask)):
        assert_close(got, want, what="derivative", floor=float(np.abs(want).max()))


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_channels_first(name):
    function, reference, *_ = FUNCTIONS[name]
    x = data((4, 6, 9, 5), "float32", 1e4, 1.0, None)

    @jax.jit
    def run(x):
        moved = function(jnp.moveaxis(x, 1, -1), None, None)
        return function(x, None, None, feature_axis=1), jnp.moveaxis(moved, -1, 1)

    y, moved = run(x)
    assert_close(y, reference(x, None, None, feature_axis=1))
    assert_close(y, np.asarray(moved))


def test_group_norm_on_any_feature_axis_and_any_reduced_axes():
    x = data((4, 6, 9, 5), "float32", 1e3, 1.0, None)
    for options in ({"feature_axis": 1}, {"feature_axis": 2, "axis": (2, 3)}, {"axis": (0, 3)}):
        groups = 5 if options.get("feature_axis") is None else 3
        y = jax.jit(partial(jaxnorm.group_norm, num_groups=groups, **options))(x)
        assert_close(y, oracle.group_norm(x, num_groups=groups, **options))


def test_layer_norm_over_some_axes_with_parameters_on_others():
    x = data((4, 6, 5), "float32", 1e3, 1.0, None)
    scale = np.arange(1, 6, dtype="f")
    y = jax.jit(partial(jaxnorm.layer_norm, axis=(1, 2), feature_axis=-1))(x, scale)
    assert_close(y, oracle.layer_norm(x, scale, axis=(1, 2), feature_axis=-1), floor=5.0)


def test_scale_offset_is_added_before_rounding():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    scale = jnp.asarray(rng.normal(size=256) * 2e-3, jnp.bfloat16)
    y = jaxnorm.rms_norm(x, scale, scale_offset=1.0)
    assert_close(y, oracle.rms_norm(np.asarray(x), np.asarray(scale), scale_offset=1.0))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_complex(name):
    function, reference, backward, *_ = FUNCTIONS[name]
    if name == "batch":
        stats = jaxnorm.init_batch_stats(6, jnp.complex64)
        function = lambda x, s, b: jaxnorm.batch_norm(x, s, b, stats, training=True)[0]  # noqa: E731
    rng = np.random.default_rng(4)

    def numbers(*shape):
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype("complex64")

    x, scale, bias, dy = numbers(4, 5, 6) + 100, numbers(6), numbers(6), numbers(4, 5, 6)
    y, derivatives = value_and_vjp(function)(dy, x, scale, bias)
    assert_close(y, reference(x, scale, bias), floor=4.0)
    for got, want in zip(derivatives, backward(dy, x, scale, bias)):
        assert_close(got, want, what="derivative", floor=float(np.abs(want).max()))
