"""A bias is called idle where its gradient is nothing but rounding, and nowhere else."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from drawn import initial
from flax import nnx

from jaxnorm.monitor import attach, observe
from jaxnorm.monitor.diagnosis.evidence import Evidence
from jaxnorm.monitor.diagnosis.rules.statistics import idle_bias

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6, 5)).astype(np.float32)


def idle(function, *args):
    """The layers whose biases are called idle, which no number decides."""
    shapes = jax.eval_shape(observe(function), *args)[1]
    seen = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return {
        layer for finding in idle_bias(Evidence.of_observations(seen)) for layer in finding.where
    }


def idle_linen(model, variables):
    return idle(lambda v: attach(model).apply(v, X, mutable=["batch_stats"]), variables)


def small(bias_gradient, kernel_gradient):
    return np.abs(bias_gradient).max() < 1e-4 * np.abs(kernel_gradient).max()


class Beside(nn.Module):
    """Layers of one kind, each before a batch norm over other axes."""

    layer: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        return [
            nn.BatchNorm(False, axis=axis)(self.layer(name=f"before {axis}")(x))
            for axis in (-1, 1, (1, 2), (-2, -1))
        ]


@pytest.mark.parametrize(
    "layer",
    [
        partial(nn.Dense, 4),
        partial(nn.Conv, 4, (3,)),
        partial(nn.ConvTranspose, 4, (3,)),
        partial(nn.ConvLocal, 4, (3,)),
        partial(nn.DenseGeneral, (4,)),
        partial(nn.DenseGeneral, (3, 4)),
        partial(nn.DenseGeneral, (1, 4)),
    ],
    ids=lambda layer: f"{layer.func.__name__}{layer.args[0]}",
)
def test_where_its_gradient_is_rounding(layer):
    model = Beside(layer)
    variables = initial(model, X)
    shapes = jax.eval_shape(partial(model.apply, mutable=["batch_stats"]), variables, X)[0]
    cotangents = [RNG.normal(size=y.shape).astype(np.float32) for y in shapes]

    @jax.jit
    @jax.grad
    def slopes(params):
        made, _ = model.apply({**variables, "params": params}, X, mutable=["batch_stats"])
        return sum((y * cotangent).sum() for y, cotangent in zip(made, cotangents))

    expected = {
        name for name, slope in slopes(variables["params"]).items()
        if name.startswith("before") and small(slope["bias"], slope["kernel"])
    }  # fmt: skip
    assert 0 < len(expected) < 4
    assert idle_linen(model, variables) == expected


def test_of_a_layer_that_has_none_whatever_its_fields_say():
    class Bare(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("kernel", self.kernel_init, (x.shape[-1], self.features))

    model = nn.Sequential([Bare(4), nn.BatchNorm(False)])
    assert not idle_linen(model, initial(model, X))


def test_of_a_layer_before_frozen_statistics():
    model = nn.Sequential([nn.Dense(4), nn.BatchNorm(True)])
    assert not idle_linen(model, initial(model, X))


@pytest.mark.parametrize("axis", [-1, 1])
def test_in_nnx(axis):
    @nnx.jit
    def model():
        rngs, features = nnx.Rngs(0), 4 if axis == -1 else 6
        norm = nnx.BatchNorm(features, axis=axis, rngs=rngs)
        return nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), norm)

    cotangent = RNG.normal(size=(16, 6, 4)).astype(np.float32)
    gradient = nnx.jit(nnx.grad(lambda model: (model(X) * cotangent).sum()))
    slopes = gradient(model())["layers"][0]
    expected = small(slopes["bias"][...], slopes["kernel"][...])
    assert expected == (axis == -1)
    graph, state = nnx.split(model())
    found = idle(lambda state: attach(nnx.merge(graph, state))(X), state)
    assert bool(found) == expected
