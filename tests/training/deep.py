"""A network with two batch norms, and its training written in float64 without Flax."""

import jax
import jax.numpy as jnp
import numpy as np
from drawn import Dense, Linear
from flax import linen as nn
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

FEATURES, HIDDEN = 16, 64  # the kernel between them has 1024 elements: a layout splits it
MOMENTUM, EPSILON = 0.9, 1e-5
RATE = 0.1


class LinenDeep(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        options = {"momentum": MOMENTUM, "epsilon": EPSILON}
        x = jaxnorm.linen.BatchNorm(not train, name="before", **options)(x)
        x = Dense(HIDDEN, name="first")(x)
        x = jaxnorm.linen.BatchNorm(not train, name="norm", **options)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return Dense(1, name="last")(x)


class NNXDeep(nnx.Module):
    def __init__(self, dropout=0.0, *, rngs):
        options = {"momentum": MOMENTUM, "epsilon": EPSILON, "rngs": rngs}
        self.before = jaxnorm.nnx.BatchNorm(FEATURES, **options)
        self.first = Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = jaxnorm.nnx.BatchNorm(HIDDEN, **options)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = Linear(HIDDEN, 1, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.first(self.before(x)))
        return self.last(self.dropout(jnp.tanh(x)))


MAKE = {
    "linen": LinenDeep,
    "nnx": lambda **kwargs: lambda rngs: NNXDeep(**kwargs, rngs=rngs),
}


def squared_error(outputs, batch):
    return ((outputs - batch["y"]) ** 2).mean()


def data(count=3, size=32, seed=0):
    rng = np.random.default_rng(seed)
    x = (1e3 + rng.normal(0, 2, (count, size, FEATURES))).astype(np.float32)
    y = np.sin(x.sum(-1, keepdims=True)).astype(np.float32)
    return [{"x": a, "y": b} for a, b in zip(x, y)]


def plain(tree):
    """A state's variables as dictionaries of float64."""
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _loss(params, batch):
    """The loss, and mean and variance before each norm."""
    x, seen = batch["x"], {}
    for norm, dense in (("before", "first"), ("norm", "last")):
        mean = x.sum(0) / len(x)
        var = ((x - mean) ** 2).sum(0) / len(x)
        seen[norm] = {"mean": mean, "var": var}
        x = (x - mean) / jnp.sqrt(var + EPSILON) * params[norm]["scale"] + params[norm]["bias"]
        x = jnp.tanh(x) if norm == "norm" else x
        x = x @ params[dense]["kernel"] + params[dense]["bias"]
    return ((x - batch["y"]) ** 2).mean(), seen


_gradient = jax.jit(jax.value_and_grad(_loss, has_aux=True))


def reference(params, stats, steps):
    """Gradient descent in float64, as a reference.

    Each step is a list of micro-batches. The gradient is the mean of theirs, and running statistics
    are updated once for each. Returns parameters, running statistics and losses.
    """
    with jax.enable_x64(True):
        losses = []
        for micro_batches in steps:
            total = jax.tree.map(np.zeros_like, params)
            loss = 0.0
            for batch in micro_batches:
                batch = jax.tree.map(lambda x: np.asarray(x, np.float64), batch)
                (value, seen), grads = _gradient(params, batch)
                total = jax.tree.map(
                    lambda t, g: t + np.asarray(g) / len(micro_batches), total, grads
                )
                stats = jax.tree.map(
                    lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * np.asarray(new), stats, seen
                )
                loss += float(value) / len(micro_batches)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, total)
            losses.append(loss)
    return params, stats, losses


def evaluated(params, stats, x):
    """Outputs in evaluation mode, in float64."""
    for norm, dense in (("before", "first"), ("norm", "last")):
        x = (x - stats[norm]["mean"]) / np.sqrt(stats[norm]["var"] + EPSILON)
        x = x * params[norm]["scale"] + params[norm]["bias"]
        x = np.tanh(x) if norm == "norm" else x
        x = x @ params[dense]["kernel"] + params[dense]["bias"]
    return x


def assert_trained(state, losses, expected, tolerance=2e-5):
    """Compare parameters, running statistics and losses of a run with those of `reference`."""
    params, stats, wanted = expected
    np.testing.assert_allclose(losses, wanted, rtol=10 * tolerance)
    for got, want in ((plain(state.params), params), (plain(state.batch_stats), stats)):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
        )
