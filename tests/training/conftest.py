"""Models under test, in both frameworks, and the same network written in JAX alone."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from flax import linen as nn
from flax import nnx

import jaxnorm.linen
import jaxnorm.nnx

LINEN_NORM: Any = jaxnorm.linen
NNX_NORM: Any = jaxnorm.nnx

MOMENTUM = 0.9
EPSILON = 1e-5
FEATURES = 3
HIDDEN = 4
RANDOM = nn.initializers.lecun_normal()  # the default of both frameworks


class LinenNet(nn.Module):
    dropout: float = 0.0
    remat: bool = False
    kernel_init: Callable[..., Any] = drawn

    @nn.compact
    def __call__(self, x, train):
        norm = nn.remat(LINEN_NORM.BatchNorm) if self.remat else LINEN_NORM.BatchNorm
        x = nn.Dense(HIDDEN, kernel_init=self.kernel_init, name="first")(x)
        x = norm(not train, momentum=MOMENTUM, epsilon=EPSILON, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, kernel_init=self.kernel_init, name="last")(x)


class NNXNet(nnx.Module):
    def __init__(self, dropout=0.0, remat=False, kernel_init=drawn, *, rngs):
        self.first = nnx.Linear(FEATURES, HIDDEN, kernel_init=kernel_init, rngs=rngs)
        self.norm = NNX_NORM.BatchNorm(HIDDEN, momentum=MOMENTUM, epsilon=EPSILON, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, kernel_init=kernel_init, rngs=rngs)
        self.remat = remat

    def __call__(self, x):
        x = self.first(x)
        norm = nnx.remat(lambda layer, x: layer(x)) if self.remat else lambda layer, x: layer(x)
        return self.last(self.dropout(jnp.tanh(norm(self.norm, x))))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of network: how to make it, and how to read its values as dictionaries."""

    name: str
    make: Callable[..., Any]  # an instance, or a Linen module
    make_seeded: Callable[..., Any]  # the same with parameters that depend on a seed

    @staticmethod
    def values(tree):
        pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
        return jax.tree.map(np.asarray, pure)

    def plain(self, state):
        """(params, mean, var) in the form that `plain_forward` takes."""
        stats = self.values(state.batch_stats)["norm"]
        return self.values(state.params), stats["mean"], stats["var"]


KINDS = {
    "linen": Kind("linen", LinenNet, functools.partial(LinenNet, kernel_init=RANDOM)),
    "nnx": Kind(
        "nnx",
        lambda **kwargs: NNXNet(**kwargs, rngs=nnx.Rngs(7)),
        lambda **kwargs: lambda rngs: NNXNet(**kwargs, kernel_init=RANDOM, rngs=rngs),
    ),
}


def plain_forward(params, mean, var, x, train):
    """The network without Flax: outputs, new running mean, new running variance."""
    x = x @ params["first"]["kernel"] + params["first"]["bias"]
    if train:
        m = x.sum(0) / len(x)
        v = ((x - m) ** 2).sum(0) / len(x)
        mean, var = MOMENTUM * mean + (1 - MOMENTUM) * m, MOMENTUM * var + (1 - MOMENTUM) * v
    else:
        m, v = mean, var
    x = (x - m) / jnp.sqrt(v + EPSILON) * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.tanh(x) @ params["last"]["kernel"] + params["last"]["bias"], mean, var


def squared_error(outputs, batch):
    return ((outputs - batch["y"]) ** 2).mean()


def make_batches(count, size=6, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 2.0, (count, size, FEATURES)).astype(dtype)
    y = np.sin(x.sum(-1, keepdims=True)).astype(dtype)
    return [{"x": jnp.asarray(a), "y": jnp.asarray(b)} for a, b in zip(x, y)]


class CountCalls:
    """A function that counts its calls by Python, which are one for each trace."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.fixture(params=list(KINDS))
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


@pytest.fixture(scope="session")
def plain():
    return plain_forward


@pytest.fixture(scope="session")
def mse():
    return squared_error


@pytest.fixture(scope="session")
def counting():
    return CountCalls


@pytest.fixture(scope="session")
def batches():
    return make_batches


@pytest.fixture(scope="session")
def snapshot():
    """Leaves by path as NumPy arrays; random keys as their data."""

    def leaf(x):
        key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if key else x)

    def take(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf(x) for path, x in leaves}

    return take
