"""Bad input: an error of the right type that names the operation, what it got, and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm
from jaxnorm import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    rms_norm,
    standardize_weight,
)

pytestmark = pytest.mark.unchecked_types
X = jnp.ones((4, 5))
STATS = jaxnorm.init_batch_stats(5)


def bn(x=X, scale=None, bias=None, stats=STATS, training=True, **options):
    return batch_norm(x, scale, bias, stats, training=training, **options)


# call, type of error, operation, what it was given, what to do
BAD = {
    "scale": (lambda: bn(scale=jnp.ones(3)), ValueError, "scale.shape=(3,)", "feature_axis="),
    "bias": (lambda: bn(bias=jnp.ones((1, 5))), ValueError, "bias.shape=(1, 5)", "feature_axis="),
    "stats": (lambda: bn(stats=jaxnorm.init_batch_stats(4)), ValueError, "(4,)", "feature_axis="),
    "no stats": (lambda: bn(stats=None), TypeError, "NoneType", "init_batch_stats"),
    "count": (lambda: bn(stats=STATS._replace(count=jnp.ones(3))), TypeError, "(3,)", "init_batch"),
    "axis range": (lambda: bn(feature_axis=2), ValueError, "feature_axis=2", "between -2 and 1"),
    "axis twice": (lambda: bn(feature_axis=(1, -1)), ValueError, "(1, -1)", "once"),
    "axis type": (lambda: layer_norm(X, axis="a"), TypeError, "axis='a'", "axis=-1"),
    "no axis": (lambda: layer_norm(X, axis=()), ValueError, "axis=()", "Name one"),
    "rank": (lambda: bn(jnp.ones(5)), ValueError, "x.shape=(5,)", "x[None]"),
    "rank 0": (lambda: layer_norm(jnp.float32(1)), ValueError, "x.shape=()", "x[None]"),
    "empty batch": (lambda: bn(jnp.ones((0, 5))), ValueError, "x.shape=(0, 5)", "Skip"),
    "empty row": (lambda: layer_norm(jnp.ones((5, 0))), ValueError, "(5, 0)", "Skip"),
    "empty group": (lambda: group_norm(jnp.ones((5, 0)), num_groups=4), ValueError, "(5, 0)", "Sk"),
    "symbolic": (
        lambda: jax.eval_shape(
            lambda x: bn(x, virtual_batch_size=4),
            jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 5), jnp.float32),
        ),
        ValueError, "x.shape=(b, 5)", 'symbolic_shape("4*b")',
    ),
    "integers": (lambda: bn(jnp.ones((4, 5), int)), TypeError, "int32", "astype"),
    "string": (lambda: layer_norm("abc"), TypeError, "str 'abc'", "asarray"),
    "strings": (lambda: rms_norm(np.array(["a"])), TypeError, "<U1", "astype"),
    "list": (lambda: jaxnorm.moments([1.0], 0), TypeError, "list [1.0]", "asarray"),
    "mask": (lambda: bn(mask=jnp.ones((3, 5), bool)), ValueError, "(3, 5)", "mask[..., None]"),
    "mask rank": (lambda: bn(mask=jnp.ones((1, 4, 5))), ValueError, "(1, 4, 5)", "mask[..., None]"),
    "mask type": (lambda: bn(mask="yes"), TypeError, "str 'yes'", "asarray"),
    "epsilon": (lambda: bn(epsilon=-1e-5), ValueError, "epsilon=-1e-05", "1e-5"),
    "epsilon nan": (lambda: layer_norm(X, epsilon=float("nan")), ValueError, "nan", "1e-6"),
    "epsilon array": (lambda: layer_norm(X, epsilon=jnp.ones(())), TypeError, "Array", "1e-6"),
    "decay": (lambda: bn(decay=1.5), ValueError, "decay=1.5", "0.99"),
    "decay low": (lambda: bn(decay=-0.1), ValueError, "decay=-0.1", "0.99"),
    "axis_name": (lambda: bn(axis_name="i"), ValueError, "axis_name='i'", "jax.vmap("),
    "groups": (lambda: bn(axis_index_groups=[[0]]), ValueError, "[[0]]", "Name the axis"),
    "training": (lambda: bn(training=1), TypeError, "int 1", "static_argnames"),
    "traced": (lambda: jax.jit(lambda t: bn(training=t))(True), TypeError, "Tracer", "static_argn"),
    "num_groups": (lambda: group_norm(X, num_groups=3), ValueError, "num_groups=3", "[1, 5]"),
    "num_groups type": (lambda: group_norm(X, num_groups=2.0), TypeError, "float 2.0", "=32"),
    "group axis": (lambda: group_norm(X, num_groups=5, axis=0), ValueError, "axis=0", "leave axis"),
    "instance": (lambda: instance_norm(X, feature_axis=0), ValueError, "feature_axis=0", "x[None]"),
    "offset": (lambda: rms_norm(X, scale_offset=1.0), ValueError, "scale=None", "Give a scale"),
    "sample": (
        lambda: layer_norm(X, jnp.ones((4, 1, 5))), ValueError, "scale.shape=(4, 1, 5)", "[:, None",
    ),
    "sample size": (lambda: rms_norm(X, jnp.ones((2, 5))), ValueError, "(2, 5)", "[:, None"),
    "offset of norms": (
        lambda: group_norm(X, num_groups=5, scale_offset=1.0), ValueError, "scale=None", "Give a",
    ),
    "activation": (lambda: layer_norm(X, activation="relu"), TypeError, "str 'relu'", "silu"),
    "activation's shape": (
        lambda: layer_norm(X, activation=jnp.sum), ValueError, "sum, which maps float32[4, 5] to "
        "float32[]", "Apply",
    ),
    "activation's dtype": (
        lambda: bn(activation=jnp.isnan), ValueError, "to bool[4, 5]", "Apply what",
    ),
    "activation's type": (
        lambda: rms_norm(X, activation=lambda v: (v, v)), ValueError, "to tuple", "Apply what",
    ),
    "activation to complex": (
        lambda: instance_norm(X, activation=jnp.fft.fft), ValueError, "complex64", "Apply what",
    ),
    "residual": (
        lambda: add_layer_norm(X, jnp.ones(5)), ValueError, "residual.shape=(5,)", "broadcast_to",
    ),
    "residual type": (lambda: add_rms_norm(X, None), TypeError, "NoneType", "asarray"),
    "options": (lambda: add_rms_norm(X, X, bias=X), TypeError, "got bias", "spelling"),
    "save": (lambda: layer_norm(X, save="y"), ValueError, "save='y'", "'input'"),
    "save activation": (
        lambda: layer_norm(X, save="output", activation=jnp.tanh), ValueError, "tanh", "to the re",
    ),
    "save axis": (
        lambda: jax.vmap(lambda x: layer_norm(x, save="output", axis_name="i"), axis_name="i")(X),
        ValueError, "axis_name='i'", "save='input'",
    ),
    "gain": (
        lambda: standardize_weight(X, jnp.ones(4)), ValueError, "gain.shape=(4,)", "One for each",
    ),
    "vector": (lambda: standardize_weight(jnp.ones(3)), ValueError, "kernel.shape=(3,)", "axis=0"),
    "batch as feature": (
        lambda: group_norm(X, num_groups=2, feature_axis=0), ValueError, "feature_axis=0", "Name",
    ),
    "axis_name type": (lambda: bn(axis_name=0), TypeError, "axis_name=0", "Give the name"),
    "no values": (
        lambda: layer_norm(jax.ShapeDtypeStruct((3,), "float32")), TypeError, "ShapeDtype", "eval_",
    ),
    "float8": (lambda: layer_norm(X.astype("float8_e5m2")), TypeError, "float8_e5m2", "astype"),
    "implementation": (lambda: bn(implementation="pallas"), ValueError, "'pallas'", "None"),
    "virtual batch": (lambda: bn(virtual_batch_size=3), ValueError, "size=3", "Choose one of"),
    "dtype": (lambda: layer_norm(X, dtype=jnp.int8), TypeError, "dtype=int8", "bfloat16"),
    "complex": (lambda: bn(X.astype(jnp.complex64)), TypeError, "complex64", "init_batch_stats"),
    "to real": (
        lambda: layer_norm(X + 1j, dtype=jnp.float32), TypeError, "dtype=float32", "dtype=None",
    ),
}  # fmt: skip


@pytest.mark.sample
@pytest.mark.parametrize("name", BAD)
def test_three_parts(name):
    call, kind, given, advice = BAD[name]
    with pytest.raises(kind) as raised:
        call()
    message = str(raised.value).split("\n---")[0]
    operation = message.split(":")[0]
    assert operation in {*jaxnorm.__all__}, message
    assert given in message, message
    assert advice in message, message


def test_an_empty_batch_is_fine_where_nothing_is_reduced():
    assert layer_norm(jnp.ones((0, 5))).shape == (0, 5)
    assert bn(jnp.ones((0, 5)), training=False)[0].shape == (0, 5)
