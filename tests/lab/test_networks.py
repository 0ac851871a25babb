"""The networks against Flax's own convolution, and the signal that passes through them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax

from jaxnorm.lab import networks
from jaxnorm.monitor import attach, observe


@pytest.mark.sample
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
def test_patches_are_a_convolution(size, strides):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, *size, 3)).astype(np.float32)
    kernel = draw.normal(size=(3, 3, 3, 5)).astype(np.float32)

    @jax.jit
    def both(x, kernel):
        names = "NHWC", "HWIO", "NHWC"
        expected = lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=names)
        return networks.convolve_patches(x, kernel, strides, "SAME"), expected

    got, expected = both(x, kernel)
    np.testing.assert_allclose(got, expected, atol=2e-5)  # 27 products of size one


def test_the_first_kernels_do_not_depend_on_the_normalization():
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)
    found = {}
    for name in ("none", "batch", "weight"):
        network = networks.build_network("conv", name, 10)
        init = partial(network.init, jax.random.key(0), training=True)
        params = jax.eval_shape(init, images)["params"]
        params = jax.tree.map(lambda leaf: np.zeros((2, *leaf.shape), leaf.dtype), params)
        found[name] = networks.draw_kernels(params, [3, 4])
    kernels = {name: np.asarray(params["Conv_2"]["kernel"]) for name, params in found.items()}
    np.testing.assert_array_equal(kernels["none"], kernels["batch"])
    np.testing.assert_array_equal(kernels["none"], kernels["weight"])
    assert not np.array_equal(kernels["none"][0], kernels["none"][1])
    # 2304 draws of variance 2 / 144: their deviation is known to 1.5 %.
    np.testing.assert_allclose(kernels["none"][0].std(), np.sqrt(2 / 144), rtol=0.06)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_weight_standardization_alone_keeps_the_signal(network):
    draw = np.random.default_rng(0)
    images = draw.normal(size=(64, 8, 8, 1)).astype(np.float32)
    net = networks.build_network(network, "weight", 10).clone(kernel_init=drawn)
    variables = jax.jit(net.init, static_argnums=2)(jax.random.key(0), images, True)
    observed = jax.jit(observe(attach(net).apply, channels=True), static_argnums=2)
    _, seen = observed(variables, images, True)
    inputs = [seen[name].channels.moments for name in seen if name.endswith(":input")]
    spreads = [float(np.sqrt(channels.var).mean()) for channels in inputs]
    assert len(spreads) == net.depth
    assert min(spreads) > 0.5 and max(spreads) < 2


def test_names_that_are_not_known():
    with pytest.raises(ValueError, match="network must be one of mlp, conv; got 'rnn'"):
        networks.build_network("rnn", "none", 10)
    with pytest.raises(ValueError, match="normalization must be one of"):
        networks.build_network("mlp", "spectral", 10)
    with pytest.raises(ValueError, match="averages over pixels"):
        networks.build_network("mlp", "instance", 10)
