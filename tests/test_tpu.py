"""The TPU compiler, which needs no TPU: every norm compiles, sharded too, with no gather."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")

C = 256
STATS = jaxnorm.init_batch_stats(C)
NORMS = {
    "batch": lambda x: jaxnorm.batch_norm(x, None, None, STATS, training=True)[0],
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
    "group": jaxnorm.group_norm,
    "instance": jaxnorm.instance_norm,
}


@cache
def mesh(topology: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices), ("data",))


def compiled(function, topology: str, spec: P) -> str:
    x = jax.ShapeDtypeStruct(
        (64, 8, 8, C), jnp.bfloat16, sharding=NamedSharding(mesh(topology), spec)
    )

    def both(x, dy):
        return jax.vjp(function, x)[1](dy)[0]

    return jax.jit(both).trace(x, x).lower(lowering_platforms=("tpu",)).compile().as_text()


def reduced_elements(entry: str) -> list[int]:
    """Elements of each array that an all-reduce of the entry computation hands out."""
    results = re.findall(r"= (.*?) all-reduce(?:-start)?\(", entry)
    shapes = [dims for result in results for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
    return [math.prod(int(n) for n in dims.split(",") if n) for dims in shapes]


@pytest.mark.parametrize("topology", ["v5e:2x2x1", "v6e:2x2x1"])
@pytest.mark.parametrize("name", NORMS)
def test_compiles_over_a_sharded_batch_without_a_gather(name, topology):
    text = compiled(NORMS[name], topology, P("data"))
    assert "all-gather" not in text
    assert "all-to-all" not in text
    sizes = reduced_elements(text[text.index("ENTRY ") :])
    if name == "batch":
        # Sums over the batch, forward and backward: O(channels), never the activation.
        assert sizes
        assert max(sizes) <= 2 * C
    else:
        # A predicate at most crosses the chips: statistics of an example are its own.
        assert max(sizes, default=0) <= 1
