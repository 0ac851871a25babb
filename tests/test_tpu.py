"""The cost of every norm over TPU chips, from the TPU compiler, which needs no TPU."""

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Program

import jaxnorm

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
pytestmark = pytest.mark.optimized

C = 256
STATS = jaxnorm.init_batch_stats(C)
NORMS = {
    "batch": lambda x: jaxnorm.batch_norm(x, None, None, STATS, training=True)[0],
    "layer": jaxnorm.layer_norm,
    "rms": jaxnorm.rms_norm,
    "group": jaxnorm.group_norm,
    "instance": jaxnorm.instance_norm,
}


# For each generation a board and, if the compiler knows it, a pod.
TOPOLOGIES = ["v5e:2x2x1", "v5e:16x16", "v6e:2x2x1", "v6e:16x16", "v5p:2x2x1", "v5p:8x8x8",
              "tpu7x:2x2x1"]  # fmt: skip
GATHERS = {"all-gather", "all-to-all", "reduce-scatter"}


@cache
def mesh(topology: str) -> Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return Mesh(np.array(devices), ("data",))


def compiled(function, topology: str, spec: P) -> Any:
    x = jax.ShapeDtypeStruct(
        (64, 4, 4, C), jnp.bfloat16, sharding=NamedSharding(mesh(topology), spec)
    )

    def both(x, dy):
        return jax.vjp(function, x)[1](dy)[0]

    return jax.jit(both).trace(x, x).lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.parametrize(
    ("name", "topology"),
    [(name, "v5p:4x4x4") for name in NORMS]
    + [(name, "v5e:2x2x1") for name in ("batch", "layer", "instance")]
    + [(name, "v6e:2x2x1") for name in ("batch", "rms", "group")],
)
def test_compiles_over_a_sharded_batch_without_a_gather(name, topology):
    collectives = Program(compiled(NORMS[name], topology, P("data"))).collectives
    assert not GATHERS & {c.kind for c in collectives}
    always = [c for c in collectives if not c.in_branch]
    if name == "batch":
        # Sums over the batch, forward and backward: O(channels), never the activation.
        assert [sum(a.elements for a in c.arrays) for c in always] == [2 * C, 2 * C]
    else:
        # An example's statistics need no other example: not even a predicate crosses the chips.
        assert collectives == []


@cache
def step(topology: str, mapped: bool):
    """Gradients of a dense layer with a norm; the batch is sharded over all chips."""
    devices = mesh(topology)

    def loss(parameters, stats, x):
        kernel, scale, bias = parameters
        y, new = jaxnorm.batch_norm(
            x @ kernel, scale, bias, stats, training=True, axis_name="data" if mapped else None,
            dtype=x.dtype,
        )  # fmt: skip
        mean = jnp.mean(jnp.square(y.astype(jnp.float32)))
        return (jax.lax.pmean(mean, "data") if mapped else mean), new

    def gradient(parameters, stats, x):
        return jax.grad(loss, has_aux=True)(parameters, stats, x)

    def placed(shape, dtype=jnp.float32, spec=P()):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, spec))

    if mapped:
        gradient = jax.shard_map(
            gradient, mesh=devices, in_specs=(P(), P(), P("data")), out_specs=(P(), P())
        )
    parameters = placed((128, C), jnp.bfloat16), placed((C,)), placed((C,))
    stats = jax.tree.map(lambda a: placed(a.shape, a.dtype), STATS)
    x = placed((1024 * devices.size, 128), jnp.bfloat16, P("data"))
    traced = jax.jit(gradient).trace(parameters, stats, x)
    found: Any = traced.lower(lowering_platforms=("tpu",)).compile()
    return Program(found.as_text()), found.memory_analysis().temp_size_in_bytes


@pytest.mark.sample
@pytest.mark.parametrize(
    ("topology", "mapped"),
    [(topology, False) for topology in TOPOLOGIES]
    + [(topology, True) for topology in ("v6e:2x2x1", "v6e:16x16", "tpu7x:2x2x1")],
)
def test_one_all_reduce_each_way_for_every_batch_norm(topology, mapped):
    found, _ = step(topology, mapped)
    assert not GATHERS & {c.kind for c in found.collectives}
    always = [c for c in found.collectives if not c.in_branch]
    assert {c.kind for c in always} == {"all-reduce"}
    assert {c.group_size for c in always} == {mesh(topology).size}
    # The all-reduces that the network waits for. The others are sums of gradients.
    statistics = [c for c in always if any(c.awaited)]
    assert [c.backward for c in statistics] == [False, True]
    # Two float32 numbers a channel.
    assert [c.bytes(awaited=True) for c in statistics] == [2 * 4 * C] * 2


@pytest.mark.parametrize(
    ("board", "pod", "mapped"),
    [
        ("v5e:2x2x1", "v5e:16x16", False),
        ("v6e:2x2x1", "v6e:16x16", False),
        ("v6e:2x2x1", "v6e:16x16", True),
        ("v5p:2x2x1", "v5p:8x8x8", False),
    ],
)
def test_nothing_grows_with_the_number_of_chips(board, pod, mapped):
    (small, small_memory), (large, large_memory) = (step(t, mapped) for t in (board, pod))

    def traffic(found):
        return [(c.kind, c.bytes(), c.awaited) for c in found.collectives if not c.in_branch]

    assert traffic(small) == traffic(large)
    # The compiler decides anew what stays on chip, and knows more neighbours: next to the batch's
    # share, which is a quarter of a MiB, that is not growth.
    assert large.hbm_bytes <= 1.03 * small.hbm_bytes
    assert large_memory <= small_memory + 2**16


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_moments_of_narrow_numbers_take_one_read(name):
    """One read for the moments, one for the rest, and one write: no copy, no further read."""
    sharding = NamedSharding(Mesh(mesh("v6e:2x2x1").devices.flat[:1], ("data",)), P())
    shape = (256, 28, 28, C) if name in ("group", "instance") else (65536, 1024)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    lowered = jax.jit(NORMS[name]).trace(x).lower(lowering_platforms=("tpu",))
    passes = Program(lowered.compile().as_text()).hbm_bytes / (math.prod(shape) * 2)
    assert 2.9 < passes < 3.05


def test_slices_of_millions_of_elements_compile():
    """The element that a first read is taken about is fetched without what lies beside it."""
    sharding = NamedSharding(Mesh(mesh("v5e:2x2x1").devices.flat[:1], ("data",)), P())
    x = jax.ShapeDtypeStruct((4, 2**23), jnp.float32, sharding=sharding)
    lowered = jax.jit(jaxnorm.layer_norm).trace(x).lower(lowering_platforms=("tpu",))
    passes = Program(lowered.compile().as_text()).hbm_bytes / (4 * 2**23 * 4)
    assert 3.9 < passes < 4.1
