"""Options and arguments of the NNX layers that Flax's do not have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxnorm.nnx as jnn
from jaxnorm.testing import assert_close, oracle

RNG = np.random.default_rng(0)
X, RESIDUAL = (jnp.asarray(RNG.normal(size=(4, 5, 6)), jnp.float32) for _ in range(2))
SCALE, BIAS = (jnp.asarray(RNG.normal(size=(4, 1, 6)), jnp.float32) for _ in range(2))
LAYERS = {
    "LayerNorm": ({}, oracle.layer_norm),
    "RMSNorm": ({}, oracle.rms_norm),
    "GroupNorm": ({"num_groups": 3}, lambda *a, **o: oracle.group_norm(*a, num_groups=3, **o)),
    "InstanceNorm": ({}, oracle.instance_norm),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, **options):
    return getattr(jnn, name)(6, **LAYERS[name][0], **options, rngs=nnx.Rngs(0))


@each_layer
def test_activation_and_scale_offset(name):
    layer = make(name, activation=jnp.tanh, scale_offset=1.0, scale_init=nnx.initializers.zeros)
    wanted = np.tanh(LAYERS[name][1](np.asarray(X)))
    assert_close(layer(X), wanted, conditioning=2.0)
    assert_close(nnx.jit(lambda m, x: m(x))(layer, X), wanted, conditioning=2.0)


def test_activation_of_batch_norm():
    layer = jnn.BatchNorm(6, activation=nnx.relu, rngs=nnx.Rngs(0))
    wanted = oracle.batch_norm(np.asarray(X), None, None, np.zeros(6), np.ones(6), training=True)
    assert_close(layer(X), np.maximum(wanted[0], 0))


def test_an_activation_with_parameters_learns():
    class Slope(nnx.Module):
        def __init__(self):
            self.slope = nnx.Param(jnp.asarray(0.25))

        def __call__(self, v):
            return jnp.where(v > 0, v, self.slope[...] * v)

    layer = make("LayerNorm", activation=Slope())
    gradient = nnx.jit(nnx.grad(lambda m: m(X).sum()))(layer)
    negative = np.minimum(oracle.layer_norm(np.asarray(X)), 0)
    assert_close(gradient["activation"]["slope"][...], negative.sum(), what="derivative")
    for slope in (0.25, 3.0):
        layer.activation.slope[...] = jnp.asarray(slope)
        assert_close(np.min(layer(X)), slope * negative.min(), conditioning=3.0)


@each_layer
def test_scale_and_bias_in_the_call(name):
    given = {"scale": SCALE} if name == "RMSNorm" else {"scale": SCALE, "bias": BIAS}
    layer = make(name, scale_offset=1.0, **{f"use_{n}": False for n in given})
    numbers = {n: np.asarray(v) for n, v in given.items()}
    wanted = LAYERS[name][1](np.asarray(X), **numbers, scale_offset=1.0)
    assert_close(layer(X, **given), wanted, conditioning=4.0)
    if name != "RMSNorm":
        y = make(name, use_scale=False, bias_init=nnx.initializers.ones)(X, scale=SCALE)
        wanted = LAYERS[name][1](np.asarray(X), numbers["scale"], np.ones(6))
        assert_close(y, wanted, conditioning=4.0)
    with pytest.raises(ValueError, match=rf"{name}: a scale given .*\(4, 1, 6\) .* use_scale=Fal"):
        make(name)(X, scale=SCALE)


@pytest.mark.sample
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_residual(name):
    """The dtypes of `flax.linen`'s rule: the sum counts where no dtype is given."""
    x = X.astype(jnp.bfloat16)
    for dtype in (None, jnp.bfloat16):
        layer = make(name, dtype=dtype, param_dtype=jnp.bfloat16)
        y, total = layer(x, residual=RESIDUAL)
        assert (y.dtype, total.dtype) == (dtype or jnp.float32, jnp.float32)
        np.testing.assert_array_equal(total, x.astype(jnp.float32) + RESIDUAL)
        assert_close(y, LAYERS[name][1](np.asarray(total)))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_save_output(name):
    """The same numbers, and the output in place of the input between the passes."""
    kept, gradients = [], []
    for save in ("input", "output"):
        layer = make(name, save=save)
        y, back = jax.vjp(layer, X)
        kept.append({id(a) for a in jax.tree.leaves(back)} & {id(X), id(y)})
        gradients.append(back(RESIDUAL)[0])
    assert len(kept[1]) == 1 and kept[0] != kept[1]
    np.testing.assert_allclose(*gradients, atol=2e-6)
