"""`jit` over sharded arrays: one result on any layout, and little communication."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangent
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from programs import Program

import jaxnorm
from jaxnorm.testing import assert_close

SHAPE = (16, 6, 64)
STATS = jaxnorm.init_batch_stats(SHAPE[-1])
RNG = np.random.default_rng(0)
SCALE, BIAS = (jnp.asarray(RNG.normal(size=SHAPE[-1]) + 1, jnp.float32) for _ in range(2))


def batch(x, scale, bias, **options):
    y, stats = jaxnorm.batch_norm(x, scale, bias, STATS, training=True, **options)
    return y, stats.mean, stats.var


NORMS = {
    "batch": batch,
    "virtual batch of 8": partial(batch, virtual_batch_size=8),
    "virtual batch of 1": partial(batch, virtual_batch_size=1),
    "layer": lambda *a: (jaxnorm.layer_norm(*a),),
    "rms": lambda x, scale, bias: (jaxnorm.rms_norm(x, scale),),
    "groups within a device": lambda *a: (jaxnorm.group_norm(*a, num_groups=16),),
    "groups over devices": lambda *a: (jaxnorm.group_norm(*a, num_groups=2),),
    "instance": lambda *a: (jaxnorm.instance_norm(*a),),
}
AXES = {"rows": P("d"), "features": P(None, None, "d"), "both": P("d", None, "m")}
KINDS = (AxisType.Auto, AxisType.Explicit)
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
# Every norm on every layout; both kinds of axes where their reshapes or their statistics differ.
PAIRED = ("layer", "rms", "instance", "virtual batch of 1")
each = pytest.mark.parametrize(
    "name, layout, kind",
    [
        (name, layout, kind)
        for i, name in enumerate(NORMS)
        for j, layout in enumerate(AXES)
        for k, kind in enumerate(KINDS)
        if name not in PAIRED or (i + j + k) % 2
    ],
)


def mesh(layout, kind):
    shape, names = ((4, 2), ("d", "m")) if layout == "both" else ((8,), ("d",))
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def both(name, x, ct, scale, bias):
    """Values, and the gradients for a random cotangent."""

    def loss(x, scale, bias):
        out = NORMS[name](x, scale, bias)
        return (out[0] * ct).sum(), out

    first, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
    return out, first


@cache
def data(offset):
    x = RNG.normal(size=SHAPE) * 2 + np.arange(SHAPE[0])[:, None, None] + offset
    # A NumPy array: a JAX array that is made while a mesh is set belongs to that mesh for good.
    return np.float32(x), np.asarray(cotangent(SHAPE))


on_one_device = jax.jit(both, static_argnums=0)


@cache
def one_device(name, offset):
    return on_one_device(name, *data(offset), SCALE, BIAS)


@cache
def compiled(name, layout, kind):
    sharding = NamedSharding(mesh(layout, kind), AXES[layout])
    with jax.set_mesh(sharding.mesh):
        x = jax.device_put(jnp.zeros(SHAPE), sharding)
        return sharding, jax.jit(partial(both, name)).lower(x, x, SCALE, BIAS).compile()


def agree(got, wanted):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(g.dtype, jnp.integer):
            assert (np.asarray(g) == np.asarray(w)).all()
        else:
            assert_close(g, np.asarray(w, np.float64), what="derivative")


@pytest.mark.sample
@each
def test_as_on_one_device(name, layout, kind):
    sharding, run = compiled(name, layout, kind)
    with jax.set_mesh(sharding.mesh):
        placed = run.input_shardings[0]
        for offset in (0.0, 1e4):
            arrays = map(jax.device_put, (*data(offset), SCALE, BIAS), placed)
            agree(run(*arrays), one_device(name, offset))


@each
def test_traffic(name, layout, kind):
    """No gather of the activation; one all-reduce each way for the statistics of a batch."""
    _, run = compiled(name, layout, kind)
    found = [c for c in Program(run.as_text()).collectives if not c.in_branch]
    gathered = [c for c in found if c.kind != "all-reduce"]
    channels = SHAPE[0] * SHAPE[-1]  # moments of every channel; the activation is larger
    assert all(a.elements < channels for c in gathered for a in c.arrays), gathered
    reduced = [c for c in found if c.kind == "all-reduce"]
    if name == "batch" and layout != "features":
        # One more number tells if the guess is near.
        sums = [c for c in reduced if sum(a.elements for a in c.arrays) > 1]
        assert [c.backward for c in sums] == [False, True], sums
        share = SHAPE[-1] // (1 if layout == "rows" else 2)
        # Backward they are the gradients of scale and bias, and one of the two as it is scaled.
        assert [sum(a.elements for a in c.arrays) for c in sums] == [2 * share, 3 * share]
    if "batch" not in name and layout == "rows":
        # Statistics of an example are its own; what is summed is the parameters' gradient.
        assert all(c.backward for c in found), found
    predicates = [c for c in reduced if any(a.dtype == "pred" for a in c.arrays)]
    # All channels and virtual batches share one answer to the question if the guess is near.
    assert not predicates or ("batch" in name and (name, layout) != ("batch", "rows"))
    assert sum(a.elements for c in predicates for a in c.arrays) <= 2


@partial(jax.jit, static_argnums=3)
def two_steps(x, mask, stats, size):
    def step(stats, _):
        y, stats = jaxnorm.batch_norm(
            x, SCALE, BIAS, stats, training=True, mask=mask, virtual_batch_size=size
        )
        return stats, y

    return jax.lax.scan(step, stats, None, 2)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("spec", [P(), P("m")], ids=["whole", "like the features"])
@each_kind
def test_statistics_keep_their_layout(kind, spec, size):
    """Statistics as arguments, as in a training step, under a mask of the usual shape."""
    sharding = NamedSharding(mesh("both", kind), AXES["both"])
    x, _ = data(1e4)
    mask = np.arange(SHAPE[0])[:, None, None] % 3 > 0
    stats = jaxnorm.BatchStats(np.asarray(STATS.mean) + 3, np.asarray(STATS.var) * 2, STATS.count)

    wanted = two_steps(x, mask, stats, size)
    with jax.set_mesh(sharding.mesh):
        *moments, count = stats
        placed = (jax.device_put(a, NamedSharding(sharding.mesh, spec)) for a in moments)
        given = jaxnorm.BatchStats(*placed, count)
        got = two_steps(jax.device_put(x, sharding), mask, given, size)
        agree(got, wanted)
        if kind == AxisType.Explicit:
            assert jax.typeof(got[0].mean) == jax.typeof(given.mean)


@pytest.mark.parametrize("num_groups", [1, 2, 16])
def test_groups_where_another_axis_is_manual(num_groups):
    sharding = NamedSharding(mesh("both", AxisType.Explicit), AXES["both"])
    x, _ = data(1e4)
    norm = partial(jaxnorm.group_norm, num_groups=num_groups)
    alone = jax.jit(norm)(x)
    with jax.set_mesh(sharding.mesh):
        mapped = jax.shard_map(norm, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
        agree(jax.jit(mapped)(jax.device_put(x, sharding)), alone)


@each_kind
def test_a_second_derivative_over_a_mesh(kind):
    sharding = NamedSharding(mesh("both", kind), AXES["both"])
    x, ct = data(1e4)

    def curved(x, ct):
        return jax.jvp(lambda x: both("batch", x, ct, SCALE, BIAS)[1], (x,), (ct,))[1]

    alone = jax.jit(curved)(x, ct)
    with jax.set_mesh(sharding.mesh):
        agree(jax.jit(curved)(*(jax.device_put(a, sharding) for a in (x, ct))), alone)
