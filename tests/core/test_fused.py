"""Fused forms against the float64 oracle: residual sums, activations, scales of each sample."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import value_and_vjp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.testing import assert_close, condition_number, oracle

SHAPE = (5, 7, 24)
DTYPES = ("float32", "bfloat16")
OFFSETS = (0.0, 1e4)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def _no_bias(function):
    return lambda x, scale, bias, **options: function(x, scale, **options)


def _no_bias_vjp(function):
    return lambda dy, x, scale, bias, **options: (*function(dy, x, scale, **options), None)


# function, oracle, its backward, reduced axes of a rank 3 array with features last
NORMS = {
    "layer": (jaxnorm.layer_norm, oracle.layer_norm, oracle.layer_norm_vjp, 2),
    "rms": (
        _no_bias(jaxnorm.rms_norm),
        _no_bias(oracle.rms_norm),
        _no_bias_vjp(oracle.rms_norm_vjp),
        2,
    ),
    "group": (
        partial(jaxnorm.group_norm, num_groups=3),
        partial(oracle.group_norm, num_groups=3),
        partial(oracle.group_norm_vjp, num_groups=3),
        1,
    ),
    "instance": (jaxnorm.instance_norm, oracle.instance_norm, oracle.instance_norm_vjp, 1),
}


def numbers(seed, shape, dtype, offset=0.0, deviation=1.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * deviation + offset).astype(dtype)


def data(dtype, offset, seed=0):
    """Of a deviation that leaves bfloat16 some digits at the offset."""
    return numbers(seed, SHAPE, dtype, offset, 300.0 if offset else 1.0)


def assert_cotangents(got, wanted, dtype, conditioning, **options):
    for what, g, w in zip(("dx", "dscale", "dbias"), got, wanted):
        if w is None:
            continue
        assert g.shape == w.shape and g.dtype == dtype, what
        assert_close(
            g, w, dtype, what="derivative", floor=min(1.0, float(np.abs(w).max())),
            conditioning=conditioning, name=what, **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [(name, shape, "float32") for name in NORMS for shape in ((5, 1, 24), SHAPE, (1, 7, 1))]
    + [
        ("layer", (1, 1, 24), "float32"), ("group", (1, 1, 24), "float32"),
        ("layer", (5, 1, 24), "bfloat16"), ("rms", SHAPE, "bfloat16"),
        ("group", (1, 7, 1), "bfloat16"), ("instance", (1, 1, 24), "bfloat16"),
    ],
)  # fmt: skip
def test_scale_and_bias_of_each_sample(name, shape, dtype):
    function, reference, backward, axis = NORMS[name]
    run = value_and_vjp(partial(function, scale_offset=1.0))
    dy = numbers(3, SHAPE, dtype)
    scale, bias = numbers(1, shape, dtype), numbers(2, shape, dtype)
    largest = 1 + float(np.abs(scale.astype(float)).max())
    for offset in OFFSETS:
        x = data(dtype, offset)
        y, cotangents = run(dy, x, scale, bias)
        assert y.dtype == dtype
        assert_close(y, reference(x, scale, bias, scale_offset=1.0), dtype, conditioning=largest)
        conditioning = condition_number(x, axis, 1e-6, centered=name != "rms", terms=x.size)
        wanted = backward(dy, x, scale, bias, scale_offset=1.0)
        assert_cotangents(cotangents, wanted, dtype, conditioning * largest)


def test_a_scale_of_each_sample_is_summed_in_float32():
    """4096 equal terms in bfloat16 would stop growing at 256."""
    x = jnp.asarray(np.tile(np.asarray([1.0, -1.0], jnp.bfloat16), (4096, 1))[None])
    # Not in one program: a compiler may sum in float32 what is to be summed in bfloat16.
    gradient = jax.grad(lambda b: jaxnorm.layer_norm(x, None, b).sum(dtype=jnp.float32))
    np.testing.assert_array_equal(gradient(jnp.asarray(np.zeros((1, 1, 2), jnp.bfloat16))), 4096)


def test_parameters_on_all_axes_mean_one_thing():
    x = data("float32", 0.0)[0]
    scale = numbers(1, x.shape, "float32")
    run = jax.jit(partial(jaxnorm.layer_norm, axis=(0, 1)))
    y = np.asarray(run(x, scale))
    assert_close(y, oracle.layer_norm(x, scale, axis=(0, 1)), conditioning=4)
    np.testing.assert_allclose(run(x, scale[:1]), y / scale * scale[:1], rtol=1e-4)


@pytest.mark.parametrize("name", ["layer", "group"])
def test_scale_offset_is_added_before_rounding(name):
    function, reference, *_ = NORMS[name]
    x, scale = data("bfloat16", 0.0), numbers(1, 24, "bfloat16", deviation=2e-3)
    # Operation by operation: a compiler may leave out a rounding that stands in the program.
    with jax.disable_jit():
        y = function(*map(jnp.asarray, (x, scale)), None, scale_offset=1.0, dtype=jnp.float32)
    assert_close(y, reference(x, scale, None, scale_offset=1.0))


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


# the function, its value and its derivative in NumPy
ACTIVATIONS = {
    "silu": (
        jax.nn.silu,
        lambda v: v * sigmoid(v),
        lambda v: sigmoid(v) * (1 + v * (1 - sigmoid(v))),
    ),
    "not of JAX": (lambda v: jnp.sin(2 * v), lambda v: np.sin(2 * v), lambda v: 2 * np.cos(2 * v)),
}


def _batch(x, scale, bias, training=True, **options):
    stats = jaxnorm.init_batch_stats(24)
    return jaxnorm.batch_norm(x, scale, bias, stats, training=training, **options)[0]


def _oracle_batch(*arguments, vjp=False, training=True):
    function = oracle.batch_norm_vjp if vjp else oracle.batch_norm
    found = function(*arguments, np.zeros(24), np.ones(24), training=training)
    return found if vjp else found[0]


ACTIVATED = NORMS | {
    "batch": (_batch, _oracle_batch, partial(_oracle_batch, vjp=True), (0, 1)),
    "batch, evaluated": (
        partial(_batch, training=False),
        partial(_oracle_batch, training=False),
        partial(_oracle_batch, training=False, vjp=True),
        None,
    ),
}


@pytest.mark.parametrize(
    ("name", "activation", "dtype"),
    [(name, "silu", "float32") for name in ACTIVATED]
    + [(name, "silu", "bfloat16") for name in ("layer", "instance", "batch")]
    + [(name, "not of JAX", "float32") for name in ("rms", "group", "batch", "batch, evaluated")]
    + [("layer", "not of JAX", "bfloat16")],
)
def test_activation(name, activation, dtype):
    function, reference, backward, axis = ACTIVATED[name]
    act, value, slope = ACTIVATIONS[activation]
    run = value_and_vjp(partial(function, activation=act))
    dy = numbers(3, SHAPE, dtype)
    scale, bias = numbers(1, 24, dtype, 1.0, 0.3), numbers(2, 24, dtype)
    largest = 2 * float(np.abs(scale.astype(float)).max())
    # The statistics that evaluation is given are those of the start.
    for offset in OFFSETS[:1] if name == "batch, evaluated" else OFFSETS:
        x = data(dtype, offset)
        y, cotangents = run(dy, x, scale, bias)
        before = reference(x, scale, bias)
        # Rounded to bfloat16 once, so after the activation.
        assert_close(y, value(before), dtype, conditioning=largest * float(np.abs(before).max()))
        conditioning = 1.0
        if axis is not None:
            centered = name != "rms"
            conditioning = condition_number(x, axis, 1e-6, centered=centered, terms=x.size)
        wanted = backward(dy * slope(before), x, scale, bias)
        assert_cotangents(cotangents, wanted, dtype, conditioning * largest**2)


def test_an_activation_may_hold_values_of_its_own():
    """They carry gradients, and none is remembered from an earlier call."""
    x = jnp.asarray(data("float32", 0.0))

    def leaky(slope):
        return jaxnorm.layer_norm(x, activation=lambda v: jnp.where(v > 0, v, slope * v))

    xhat = oracle.layer_norm(np.asarray(x))
    wanted = np.minimum(xhat, 0).sum()
    for run in (lambda f: f, jax.jit):
        assert_close(run(jax.grad(lambda s: leaky(s).sum()))(0.3), wanted, what="derivative")

    class Slope:
        value = 0.5

        def __call__(self, v):
            return v * self.value

    slope = Slope()
    for slope.value in (0.5, 2.0):
        y = jaxnorm.layer_norm(x, activation=slope)
        assert_close(y, xhat * slope.value, conditioning=2.0)


@pytest.mark.sample
@pytest.mark.parametrize("save", ["input", "output"])
@each_dtype
@pytest.mark.parametrize("name", ["layer", "rms"])
def test_add(name, dtype, save):
    _, reference, backward, axis = NORMS[name]
    add = jaxnorm.add_layer_norm if name == "layer" else jaxnorm.add_rms_norm
    scale, bias = numbers(1, 24, dtype, 1.0, 0.1), numbers(2, 24, dtype, 0.0, 0.1)
    parameters = tuple(map(jnp.asarray, (scale, bias) if name == "layer" else (scale,)))
    residual = jnp.asarray(data(dtype, 0.0, seed=5))
    dy, dtotal = (jnp.asarray(numbers(seed, SHAPE, dtype)) for seed in (3, 4))
    for offset in OFFSETS:
        x = jnp.asarray(data(dtype, offset))
        # Operation by operation: one program may normalize the sum before it is rounded.
        (y, total), back = jax.vjp(partial(add, save=save), x, residual, *parameters)
        dx, dresidual, *rest = back((dy, dtotal))
        total = np.asarray(total)
        np.testing.assert_array_equal(total, x + residual)
        assert_close(y, reference(total, scale, bias), dtype, conditioning=2)
        np.testing.assert_array_equal(dx, dresidual)
        wanted, *parts = backward(dy, total, scale, bias)
        conditioning = condition_number(total, axis, 1e-6, centered=name == "layer")
        roundings = 2 if save == "input" else 2 + 6  # the last: xhat, see test_save_output
        assert_cotangents(
            (dx, *rest),
            (wanted + np.asarray(dtotal), *parts),
            dtype,
            2 * conditioning,
            roundings=roundings,
        )


def test_add_of_two_dtypes():
    x, residual = data("bfloat16", 0.0), data("float32", 0.0, seed=5)
    add = jax.jit(partial(jaxnorm.add_rms_norm, dtype=jnp.bfloat16))
    y, total = add(x, residual, numbers(1, 24, "bfloat16"))
    assert (y.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(total, x.astype("float32") + residual)
    _, cotangents = value_and_vjp(jaxnorm.add_layer_norm)((total, total), x, residual)
    assert [a.dtype for a in cotangents] == [jnp.bfloat16, jnp.float32]


ON_MESH = NORMS | {
    "layer from output": (partial(jaxnorm.layer_norm, save="output"), *NORMS["layer"][1:])
}


@pytest.mark.parametrize("layout", [P("d"), P()], ids=str)
@pytest.mark.parametrize(
    ("norm", "kind"),
    [(n, AxisType.Explicit) for n in ON_MESH] + [(n, AxisType.Auto) for n in ("layer", "group")],
    ids=str,
)
def test_scales_of_each_sample_on_a_mesh(norm, kind, layout):
    function, reference, backward, _ = ON_MESH[norm]
    shape = (8, 7, 24)
    x, dy = numbers(0, shape, "float32", 1e3), numbers(3, shape, "float32")
    scale, bias = (numbers(i, (8, 1, 24), "float32", 1.0) for i in (1, 2))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip((x, scale, bias, dy), (layout, P("d"), P("d"), P("d")))
        ]

        @jax.jit
        def run(x, scale, bias, dy):
            y, back = jax.vjp(function, x, scale, bias)
            return y, back(dy)

        y, got = run(*placed)
    assert y.sharding.is_equivalent_to(placed[-1].sharding, 3)
    assert_close(y, reference(x, scale, bias), conditioning=4)
    assert_cotangents(got, backward(dy, x, scale, bias), "float32", 4.0)
