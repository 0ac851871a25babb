"""Value and derivatives against the float64 oracle: any offset, spread, dtype, layout, outlier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import in_kernels
from compiling import jit_as_users

import jaxnorm
from jaxnorm.testing import assert_close, condition_number, oracle

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
    return jnp.asarray(np.clip(x, -limit, limit), dtype)


# Kernels run in Pallas's interpreter, slowly, and as in no user's program; they compute in float32.
KERNELS = ("layer kernel", "rms kernel", "group kernel", "instance kernel")


def found(name):
    """The row of that norm, whose function may be computed by kernels."""
    name, _, kernel = name.partition(" ")
    function, *rest = FUNCTIONS[name]
    return in_kernels(function) if kernel else function, *rest


def both(*dtypes):
    """Every norm with every dtype, and its kernels with those they take."""
    return [
        (name, dtype)
        for name in (*FUNCTIONS, *KERNELS)
        for dtype in dtypes
        if name in FUNCTIONS or dtype in ("bfloat16", "float32")
    ]


@pytest.mark.parametrize(("name", "dtype"), both("bfloat16", "float16", "float32", "float64"))
def test_value(name, dtype):
    function, reference, *_ = found(name)
    with jax.enable_x64(dtype == "float64"):
        jit = jax.jit if "kernel" in name else jit_as_users
        run = jit(lambda x: function(x, None, None))
        for shape in SHAPES[:1] if "kernel" in name else SHAPES:
            for offset in OFFSETS:
                for deviation in DEVIATIONS:
                    for outlier in OUTLIERS:
                        x = data(shape, dtype, offset, deviation, outlier)
                        y = run(x)
                        assert y.dtype == x.dtype
                        assert_close(
                            y, reference(np.asarray(x), None, None), dtype,
                            name=f"{name} {shape} {offset} {deviation} {outlier}",
                        )  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), both("bfloat16", "float32", "float64"))
def test_derivatives(name, dtype):
    function, _, backward, axes, epsilon = found(name)
    rng = np.random.default_rng(1)
    with jax.enable_x64(dtype == "float64"):

        @(jax.jit if "kernel" in name else jit_as_users)
        def run(x, scale, bias, dy):
            return jax.vjp(function, x, scale, bias)[1](dy)

        shape = SHAPES[0]
        scale, bias = (jnp.asarray(rng.normal(size=shape[-1]) + 1, dtype) for _ in range(2))
        dy = jnp.asarray(rng.normal(size=shape), dtype)
        for offset, deviation in ((0, 1), (1e2, 1), (1e4, 1e2), (1e6, 1e3), (1, 1e-2), (0, 1e6)):
            x = data(shape, dtype, offset, deviation, None)
            numbers = [np.asarray(a) for a in (dy, x, scale, bias)]
            if np.ptp(numbers[1].astype(np.float64), axis=axes).min() == 0:
                continue  # rounded to one value: nothing well-conditioned is left
            conditioning = condition_number(
                numbers[1], axes, epsilon, centered=name != "rms", terms=x.size
            )
            wanted = backward(*numbers)
            for what, got, want in zip(("dx", "dscale", "dbias"), run(x, scale, bias, dy), wanted):
                assert got.dtype == dtype
                # Derivatives with respect to x scale with 1 / deviation: measure them so.
                floor = min(1.0, float(np.abs(want).max()))
                assert_close(
                    got, want, dtype, what="derivative", floor=floor,
                    conditioning=float(np.max(conditioning)),
                    name=f"{name} {what} {offset} {deviation}",
                )  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("mask_shape", [(7, 5, 33), (7, 1, 1), (5, 1), (7, 5, 1), (1, 1, 33)])
def test_masks(name, mask_shape):
    function, reference, backward, *_ = FUNCTIONS[name]
    rng = np.random.default_rng(2)
    mask = rng.random(mask_shape) < 0.6
    x = data(SHAPES[0], "float32", 3e3, 1.0, None)
    scale, bias = (jnp.asarray(rng.normal(size=33) + 1, "float32") for _ in range(2))
    dy = jnp.asarray(rng.normal(size=x.shape), "float32")
    y, back = jax.vjp(lambda *a: function(*a, mask=jnp.asarray(mask)), x, scale, bias)
    numbers = [np.asarray(a) for a in (x, scale, bias)]
    wanted = reference(*numbers, mask=mask)
    # Where one element is left its neighbours are thousands of deviations away: relative to that.
    assert_close(y, wanted, floor=float(np.abs(wanted).max()))
    for got, want in zip(back(dy), backward(np.asarray(dy), *numbers, mask=mask)):
        assert_close(got, want, what="derivative", floor=float(np.abs(want).max()))


@pytest.mark.parametrize("name", ["batch", "instance"])
def test_channels_first(name):
    function, reference, *_ = FUNCTIONS[name]
    x = data((4, 6, 9, 5), "float32", 1e4, 1.0, None)
    y = function(x, None, None, feature_axis=1)
    assert_close(y, reference(np.asarray(x), None, None, feature_axis=1))
    moved = jnp.moveaxis(function(jnp.moveaxis(x, 1, -1), None, None), -1, 1)
    assert_close(y, np.asarray(moved))


def test_group_norm_on_any_feature_axis_and_any_reduced_axes():
    x = data((4, 6, 9, 5), "float32", 1e3, 1.0, None)
    for options in ({"feature_axis": 1}, {"feature_axis": 2, "axis": (2, 3)}, {"axis": (0, 3)}):
        groups = 5 if options.get("feature_axis") is None else 3
        y = jaxnorm.group_norm(x, num_groups=groups, **options)
        assert_close(y, oracle.group_norm(np.asarray(x), num_groups=groups, **options))


def test_layer_norm_over_some_axes_with_parameters_on_others():
    x = data((4, 6, 5), "float32", 1e3, 1.0, None)
    scale = jnp.arange(1.0, 6.0)
    y = jaxnorm.layer_norm(x, scale, axis=(1, 2), feature_axis=-1)
    wanted = oracle.layer_norm(np.asarray(x), np.asarray(scale), axis=(1, 2), feature_axis=-1)
    assert_close(y, wanted, floor=5.0)


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
        return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), jnp.complex64)

    x, scale, bias, dy = numbers(4, 5, 6) + 100, numbers(6), numbers(6), numbers(4, 5, 6)
    y, back = jax.vjp(function, x, scale, bias)
    exact = [np.asarray(a) for a in (dy, x, scale, bias)]
    assert_close(y, reference(*exact[1:]), floor=4.0)
    for got, want in zip(back(dy), backward(*exact)):
        assert_close(got, want, what="derivative", floor=float(np.abs(want).max()))
