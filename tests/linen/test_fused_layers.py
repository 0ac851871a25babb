"""Options and arguments of the Linen layers that Flax's do not have."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm.linen as jnn
from jaxnorm.testing import assert_close, oracle

KEY = jax.random.key(0)
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
    return getattr(jnn, name)(**LAYERS[name][0], **options)


@each_layer
def test_activation_and_scale_offset(name):
    layer = make(name, activation=jnp.tanh, scale_offset=1.0, scale_init=nn.initializers.zeros)
    y, variables = jax.jit(layer.init_with_output)(KEY, X)
    assert_close(y, np.tanh(LAYERS[name][1](np.asarray(X))), conditioning=2.0)
    # No variable that Flax's layer does not have.
    flax = jax.eval_shape(getattr(nn, name)(**LAYERS[name][0]).init, KEY, X)
    assert jax.tree.structure(variables) == jax.tree.structure(flax)


def test_activation_of_batch_norm():
    layer = jnn.BatchNorm(use_running_average=False, activation=nn.relu)
    y, _ = jax.jit(layer.init_with_output)(KEY, X)
    wanted = oracle.batch_norm(np.asarray(X), None, None, np.zeros(6), np.ones(6), training=True)
    assert_close(y, np.maximum(wanted[0], 0))


@each_layer
def test_scale_and_bias_in_the_call(name):
    given = {"scale": SCALE} if name == "RMSNorm" else {"scale": SCALE, "bias": BIAS}
    without = {f"use_{n}": False for n in given}
    y, variables = make(name, scale_offset=1.0, **without).init_with_output(KEY, X, **given)
    assert not variables
    numbers = {n: np.asarray(v) for n, v in given.items()}
    assert_close(y, LAYERS[name][1](np.asarray(X), **numbers, scale_offset=1.0), conditioning=4.0)
    # One in the call, the other the layer's own.
    if name != "RMSNorm":
        layer = make(name, use_scale=False, bias_init=nn.initializers.ones)
        y, variables = layer.init_with_output(KEY, X, scale=SCALE)
        assert set(variables["params"]) == {"bias"}
        wanted = LAYERS[name][1](np.asarray(X), numbers["scale"], np.ones(6))
        assert_close(y, wanted, conditioning=4.0)
    with pytest.raises(ValueError, match=rf"{name}: a scale given .*\(4, 1, 6\) .* use_scale=Fal"):
        make(name).init(KEY, X, scale=SCALE)


@pytest.mark.sample
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_residual(name):
    layer = make(name, dtype=jnp.bfloat16)
    variables = layer.init(KEY, X, residual=RESIDUAL)
    y, total = layer.apply(variables, X, residual=RESIDUAL)
    assert (y.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(total, X + RESIDUAL)
    assert_close(y, LAYERS[name][1](np.asarray(total)))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_save_output(name):
    """The same numbers, and nothing of the input's size between the passes."""
    kept, gradients = [], []
    for save in ("input", "output"):
        layer = make(name, save=save)
        variables = jax.jit(layer.init)(KEY, X)
        y, back = jax.vjp(lambda x, m=layer, v=variables: m.apply(v, x), X)
        kept.append({id(a) for a in jax.tree.leaves(back)} & {id(X), id(y)})
        gradients.append(back(RESIDUAL)[0])
    assert len(kept[1]) == 1 and kept[0] != kept[1]
    np.testing.assert_allclose(*gradients, atol=2e-6)
