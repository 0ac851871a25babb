"""A bias is called idle where its gradient is nothing but rounding, and nowhere else."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxnorm.monitor import diagnose

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6, 5)), jnp.float32)


def idle(findings):
    return "idle-bias" in {finding.rule for finding in findings}


def small(bias_gradient, kernel_gradient):
    return np.abs(bias_gradient).max() < 1e-4 * np.abs(kernel_gradient).max()


@pytest.mark.parametrize("axis", [-1, 1, (1, 2), (-2, -1)], ids=str)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Dense(4),
        nn.Conv(4, (3,)),
        nn.ConvTranspose(4, (3,)),
        nn.ConvLocal(4, (3,)),
        nn.DenseGeneral((4,)),
        nn.DenseGeneral((3, 4)),
        nn.DenseGeneral((1, 4)),
    ],
    ids=lambda layer: f"{type(layer).__name__}{getattr(layer, 'features', '')}",
)
def test_where_its_gradient_is_rounding(layer, axis):
    model = nn.Sequential([layer, nn.BatchNorm(False, axis=axis)])
    variables = jax.jit(model.init)(jax.random.key(0), X)
    y = jax.eval_shape(layer.apply, {"params": variables["params"]["layers_0"]}, X)
    cotangent = jnp.asarray(RNG.normal(size=y.shape), jnp.float32)

    def loss(params):
        made, _ = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return (made * cotangent).sum()

    slopes = jax.jit(jax.grad(loss))(variables["params"])["layers_0"]
    expected = small(slopes["bias"], slopes["kernel"])
    assert idle(diagnose(model, variables, X)) == expected


def test_of_a_layer_that_has_none_whatever_its_fields_say():
    class Bare(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))

    model = nn.Sequential([Bare(4), nn.BatchNorm(False)])
    assert not idle(diagnose(model, model.init(jax.random.key(0), X), X))


@pytest.mark.parametrize("axis", [-1, 1])
def test_in_nnx(axis):
    rngs = nnx.Rngs(0)
    features = 4 if axis == -1 else 6
    model = nnx.Sequential(
        nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(features, axis=axis, rngs=rngs)
    )
    cotangent = jnp.asarray(RNG.normal(size=(16, 6, 4)), jnp.float32)
    slopes = nnx.grad(lambda model: (model(X) * cotangent).sum())(model)["layers"][0]
    expected = small(slopes["bias"][...], slopes["kernel"][...])
    assert expected == (axis == -1)
    assert idle(diagnose(model, X)) == expected
