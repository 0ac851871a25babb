"""Kernels drawn by NumPy: JAX's initializers take longer to compile than a small model.

`Dense` and `Linear` are layers that begin with such kernels; `initial` fills any Linen model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx


def drawn(key, shape, dtype=jnp.float32, **_):
    """An initializer of kernels, of deviation fan_in^(-1/2), which depends on the shape alone."""
    values = np.random.default_rng(0).normal(size=shape)
    return jnp.asarray(values / np.sqrt(np.prod(shape[:-1])), dtype)


Dense = partial(nn.Dense, kernel_init=drawn)
Linear = partial(nnx.Linear, kernel_init=drawn)


def initial(model, *inputs, gain=1.0, **options):
    """The result of `model.init`, with kernels of variance ``gain**2 / fan_in``."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **options))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return (gain * rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(leaf.dtype)
        return np.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
