"""Small networks whose norms are recalibrated, and what NumPy says of their statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnnx

LINEN: Any = jnn
NNX: Any = jnnx
SIZES = (7, 7, 3)  # the last batch is smaller
SHAPE = (5, 5, 3)


def batches(seed=0, sizes=SIZES, shape=SHAPE, offset=0.0, dtype=np.float32):
    """Batches whose distributions differ, so that means of variances are wrong."""
    rng = np.random.default_rng(seed)
    return [
        (offset + rng.normal(size=(n, *shape)) * (1 + i) + 2 * i).astype(dtype)
        for i, n in enumerate(sizes)
    ]


def pooled(arrays, feature_axis=-1, masks=None):
    """Mean and biased variance of all elements of a list of arrays, in float64."""
    parts = []
    for i, array in enumerate(arrays):
        rows = np.moveaxis(np.asarray(array, np.float64), feature_axis, -1)
        if masks is not None:
            rows = rows[np.broadcast_to(masks[i], array.shape)[..., 0] != 0]
        parts.append(rows.reshape(-1, rows.shape[-1]))
    rows = np.concatenate(parts)
    return rows.mean(0), rows.var(0)


class Block(nn.Module):
    """A residual block with a norm in its shortcut, of Flax and of jaxnorm."""

    features: int = 4

    @nn.compact
    def __call__(self, x, train):
        y = nn.Conv(self.features, (3, 3))(x)
        y = jax.nn.relu(nn.BatchNorm(not train, name="a")(y))
        y = nn.Dropout(0.5, deterministic=not train)(y)
        y = LINEN.BatchNorm(not train, name="b")(nn.Conv(self.features, (3, 3))(y))
        shortcut = nn.BatchNorm(not train, name="c")(nn.Conv(self.features, (1, 1))(x))
        return jax.nn.relu(y + shortcut)


class ResNet(nn.Module):
    """Two such blocks, dropout and a head; one collection that every call writes."""

    @nn.compact
    def __call__(self, x, train: bool):
        seen = self.variable("notes", "seen", lambda: jnp.zeros(()))
        seen.value += 1
        x = Block(name="first")(x, train)
        x = Block(name="second")(x, train)
        return nn.Dense(2)(x.mean((1, 2)))


class NNXNet(nnx.Module):
    """Convolutions, norms and dropout, in a list."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norms = nnx.List(
            [nnx.BatchNorm(4, rngs=rngs), NNX.BatchNorm(4, unbiased=True, rngs=rngs)]
        )
        self.between = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(jax.nn.relu(self.norms[0](self.conv(x))))
        return self.norms[1](self.between(x))
