"""Bytes that a layer keeps between its forward and its backward pass, in units of x's bytes.

They are counted in the traced program: the distinct arrays that the function returned by `jax.vjp`
holds. Parameters are float32, x and the results bfloat16.
"""

import functools
import math

import jax
import jax.numpy as jnp

from benchmarks import peers as p
from benchmarks.running import Plan, Unit

SHAPES = ((4096, 1024), (32, 28, 28, 128))
GROUPS = 32
PEERS = (p.JAXNORM, p.FLAX)


def plan(*, quick: bool = False) -> Plan:
    """The plan of the run.

    Nothing is computed, only traced, so the quick form is the full form.
    """
    del quick
    settings = {
        "peers": [peer.name for peer in PEERS],
        "dtype": "bfloat16",
        "parameters": "float32",
        "columns": ["norm", "shape", "under jit", "kept bytes / bytes of x, by peer"],
    }
    units = [
        Unit(f"{norm.name} {shape}", functools.partial(_rows, norm, shape))
        for shape in SHAPES
        for norm in p.norms(GROUPS)
        # The other norms have no spatial axes there.
        if len(shape) > 2 or norm.name not in ("instance", "group")
    ]
    return Plan(settings, units)


def _rows(norm: p.Norm, shape: tuple[int, ...]) -> dict[str, list]:
    return {
        "samples": [
            [norm.name, list(shape), jit, [_kept(peer, norm, shape, jit=jit) for peer in PEERS]]
            for jit in (False, True)
        ]
    }


def _kept(peer: p.Linen, norm: p.Norm, shape, *, jit: bool) -> float:
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    feature = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
    function = peer.function(norm, jnp.bfloat16)
    function = jax.jit(function) if jit else function
    kept = {}

    def trace(parameters, x):
        y, back, state = jax.vjp(function, parameters, x, has_aux=True)
        kept.update({id(a): a for a in jax.tree.leaves(back)})
        return y, state

    jax.eval_shape(trace, p.parameters_of(norm, feature, feature), x)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in kept.values())
    return round(size / (math.prod(shape) * x.dtype.itemsize), 4)
