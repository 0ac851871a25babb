"""Networks that all tests of surgery share, with random parameters and running statistics.

`NETWORKS` has a maker under each name, such as "linen/resnet" or "nnx/unet". A maker returns a
`Network`, and compiles nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tools import linen_networks, nnx_networks


class Network(NamedTuple):
    """A model, its collections (None for NNX), and example inputs."""

    model: Any
    variables: Any
    inputs: tuple[Any, ...]


def values(rng, name, like):
    """Random values of a parameter or a statistic: scales of both signs, positive variances."""
    shape, dtype = like.shape, like.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    if name.endswith("kernel"):
        drawn = rng.normal(size=shape) / np.sqrt(max(np.prod(shape[:-1]), 1))
    elif name.endswith(("var", "sigma")):
        drawn = rng.uniform(0.3, 2.0, shape)
    elif name.endswith(("scale", "gain")):
        signs = rng.permutation(np.arange(np.prod(shape, dtype=int)) % 2 * 2 - 1).reshape(shape)
        drawn = rng.uniform(0.4, 1.6, shape) * signs
    else:
        drawn = rng.normal(size=shape) * 0.5
    return jnp.asarray(drawn, dtype)


def filled(shapes, seed):
    """A tree with values for its shapes, which depend on the seed and on their order."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        names = [str(getattr(k, "key", getattr(k, "name", ""))) for k in path]
        return values(rng, next(n for n in reversed(names) if n not in ("", "value")), leaf)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def inputs_like(shape, seed):
    """A random input of a deviation of 1 and a mean of 0.3."""
    drawn = np.random.default_rng(seed + 1).normal(0.3, 1, shape.shape)
    return (jnp.asarray(drawn, shape.dtype),)


def linen_network(make, seed=0):
    """A Linen model with random variables."""
    model, shape = make()
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, *_mode(model)), shape)
    return Network(model, filled(shapes, seed), inputs_like(shape, seed))


def nnx_network(make, seed=0):
    """An NNX model in evaluation mode, with random variables of its own."""
    make, shape = make()
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, state = nnx.split(model)
    model = nnx.merge(graph, filled(state, seed))
    for _, module in nnx.iter_modules(model):
        _change_plain_scales(module, partial(values, np.random.default_rng(seed), "scale"))
    model.eval()
    return Network(model, None, inputs_like(shape, seed))


def _change_plain_scales(module, change):
    """Change the scales of Flax's weight norm, which are arrays in a dict, and in no state."""
    if isinstance(getattr(module, "scales", None), dict):
        scales = module.scales.items()
        plain = {p: change(s) for p, s in scales if not isinstance(s, nnx.Variable)}
        module.scales = nnx.data({**module.scales, **plain})


def _mode(model):
    """The arguments of `init` that a model wants beside its inputs."""
    return (True,) if isinstance(model, linen_networks.ResNet) else ()


def cast(network, dtype):
    """The network with parameters and inputs of another dtype; its statistics stay float32."""

    def to(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    inputs = jax.tree.map(to, network.inputs)
    if network.variables is not None:
        params = jax.tree.map(to, network.variables["params"])
        return Network(network.model, {**network.variables, "params": params}, inputs)
    graph, params, rest = nnx.split(network.model, nnx.Param, ...)
    model = nnx.merge(graph, jax.tree.map(to, params), rest)
    for _, module in nnx.iter_modules(model):
        # Without a dtype of its own, an NNX norm would promote to that of its statistics.
        if getattr(module, "dtype", ...) is None:
            module.dtype = dtype
        _change_plain_scales(module, to)
    return Network(model, None, inputs)


LINEN: dict[str, Callable[..., Network]] = {
    f"linen/{name}": partial(linen_network, make) for name, make in linen_networks.MODELS.items()
}
NNX: dict[str, Callable[..., Network]] = {
    f"nnx/{name}": partial(nnx_network, make) for name, make in nnx_networks.MODELS.items()
}
NETWORKS = {**LINEN, **NNX}
