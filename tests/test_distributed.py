"""Statistics over a named axis or a mesh agree with one device that holds the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangent
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm

N, C = 8, 5
RNG = np.random.default_rng(0)
SCALE, BIAS = (jnp.asarray(RNG.normal(size=C) + 1, jnp.float32) for _ in range(2))
STATS = jaxnorm.init_batch_stats(C)
# Device 0 keeps every sample, device 3 none, the others differ.
MASK = jnp.asarray(
    [[True] * 4, [True, False, False, False], [False, True, True, False], [False] * 4] * 2
).reshape(N, 4, 1)


def batch_norm(x, scale, bias, mask, axis_name=None, groups=None):
    return jaxnorm.batch_norm(
        x, scale, bias, STATS, training=True, mask=mask, axis_name=axis_name,
        axis_index_groups=groups,
    )  # fmt: skip


def weighted(y, ct):
    return jnp.vdot(y, ct)


def vmapped(x, mask, ct, axis_name="d", groups=None):
    """Value, statistics, gradients and a second derivative, replicas along axis 0."""

    def run(x, scale, bias):
        y, stats = jax.vmap(
            lambda x, m: batch_norm(x, scale, bias, m, axis_name, groups),
            axis_name=axis_name, in_axes=(0, None if mask is None else 0),
        )(x, mask)  # fmt: skip
        return weighted(y, ct), (y, jax.tree.map(lambda s: s[0], stats))

    return derivatives(run, x)


def one_device(x, mask, ct):
    flat = None if mask is None else mask.reshape(-1, 1)

    def run(x, scale, bias):
        y, stats = batch_norm(x.reshape(-1, C), scale, bias, flat)
        return weighted(y, ct.reshape(-1, C)), (y.reshape(x.shape), stats)

    return derivatives(run, x)


def derivatives(run, x):
    gradient = jax.grad(run, argnums=(0, 1, 2), has_aux=True)
    first, aux = gradient(x, SCALE, BIAS)
    second = jax.jvp(lambda x: gradient(x, SCALE, BIAS)[0], (x,), (cotangent(x.shape, 9),))[1]
    return aux, first, second


def agree(got, wanted, atol=2e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        size = max(1.0, float(np.abs(w).max()))
        np.testing.assert_allclose(np.asarray(g) / size, np.asarray(w) / size, atol=atol)


def data(offset):
    # Each replica's share at a place of its own, so that a mean of variances would be wrong.
    x = RNG.normal(size=(N, 4, C)) + np.arange(N)[:, None, None] + offset
    return jnp.asarray(x, jnp.float32), cotangent((N, 4, C))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_vmap(offset, masked):
    x, ct = data(offset)
    mask = MASK if masked else None
    agree(jax.jit(vmapped)(x, mask, ct), jax.jit(one_device)(x, mask, ct))


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma, offset):
    x, ct = data(offset)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def run(x, scale, bias):
        def local(x, scale, bias, mask):
            y, stats = batch_norm(x.reshape(-1, C), scale, bias, mask.reshape(-1, 1), "d")
            return y.reshape(x.shape), stats

        y, stats = jax.shard_map(
            local, mesh=mesh, in_specs=(P("d"), P(), P(), P("d")),
            out_specs=(P("d"), P()), check_vma=check_vma,
        )(x, scale, bias, MASK)  # fmt: skip
        return weighted(y, ct), (y, stats)

    agree(jax.jit(lambda x: derivatives(run, x))(x), jax.jit(one_device)(x, MASK, ct))


@pytest.mark.filterwarnings("ignore:jax.pmap is deprecated")
def test_pmap():
    x, ct = data(1e4)
    mapped = jax.pmap(
        lambda x, m: batch_norm(x, SCALE, BIAS, m, "d"), axis_name="d", in_axes=(0, 0)
    )
    y, stats = mapped(x, MASK)
    (wanted, wanted_stats), *_ = one_device(x, MASK, ct)
    agree((y, jax.tree.map(lambda s: s[0], stats)), (wanted, wanted_stats))


def test_groups_of_replicas():
    x, _ = data(0.0)
    # vmap cannot split an axis into groups (JAX refuses); pmap and shard_map can.
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    groups = [[0, 2, 4, 6], [1, 3, 5, 7]]
    y = jax.jit(
        jax.shard_map(
            lambda x: batch_norm(x.reshape(-1, C), SCALE, BIAS, None, "d", groups)[0],
            mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False,
        )
    )(x).reshape(x.shape)  # fmt: skip
    for group in groups:
        part = x[jnp.array(group)]
        wanted = batch_norm(part.reshape(-1, C), SCALE, BIAS, None)[0].reshape(part.shape)
        np.testing.assert_allclose(y[jnp.array(group)], wanted, atol=1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("sharded", ["rows", "features"])
def test_jit_over_sharded_arrays(axis_type, sharded):
    """No axis_name: statistics are global, and every norm runs on any layout of its input."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axis_type,))
    x = jnp.asarray(RNG.normal(size=(8, 4, 16)) + 1e3, jnp.float32)
    spec = P("d") if sharded == "rows" else P(None, None, "d")
    stats = jaxnorm.init_batch_stats(16)
    norms = {
        "batch": lambda x: jaxnorm.batch_norm(x, None, None, stats, training=True)[0],
        "layer": jaxnorm.layer_norm,
        "rms": jaxnorm.rms_norm,
        "group": lambda x: jaxnorm.group_norm(x, num_groups=8),
        "instance": jaxnorm.instance_norm,
    }
    ct = cotangent(x.shape)
    for name, norm in norms.items():
        run = jax.jit(jax.value_and_grad(lambda x, c, norm=norm: jnp.sum(norm(x) * c)))
        wanted = run(x, ct)
        with jax.set_mesh(mesh):
            sharding = NamedSharding(mesh, spec)
            got = run(jax.device_put(x, sharding), jax.device_put(ct, sharding))
        agree(got, wanted, atol=2e-5), name


def collectives(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if " all-reduce(" in line or " all-reduce-start(" in line
    ]


def test_one_all_reduce_each_way():
    """Counted in the compiled program, outside the branch that a poor guess takes."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

    def local(x, ct):
        loss = lambda x: jnp.vdot(batch_norm(x, SCALE, BIAS, None, "d")[0], ct)  # noqa: E731
        return jax.grad(loss)(x)

    run = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=False
        )
    )
    x = jnp.ones((32, C))
    text = run.lower(x, x).compile().as_text()
    entry = text[text.index("ENTRY ") :]
    assert len(collectives(entry)) == 2, entry


def test_moments_merge_over_an_axis():
    x, _ = data(1e4)
    got = jax.vmap(lambda x, m: jaxnorm.moments(x, 0, mask=m, axis_name="d"), axis_name="d")(
        x, MASK
    )
    wanted = jaxnorm.moments(x.reshape(-1, C), 0, mask=MASK.reshape(-1, 1))
    agree(jax.tree.map(lambda a: a[0], got), wanted)
