"""Random meshes, masks and groups, against the float64 oracle."""

import itertools
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.testing import assert_close, condition_number, oracle

DEVICES, C = 8, 4
RUNNING = np.linspace(-2, 5, C), np.linspace(0.5, 3, C)
STATS = jaxnorm.BatchStats(*map(np.float32, RUNNING), np.int32(7))
MESHES = [(8,), (4, 2), (2, 4), (2, 2, 2), (1, 8), (2,), (4,), (1, 2, 1)]
NAMES = ("a", "b", "c")

# The data of one compiled program: the share of kept rows, an offset, a seed.
DATA = [(1.0, 0.0, 0), (0.3, -30.0, 1), (0.7, 1e4, 2)]

some_examples = settings(
    max_examples=16,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def arrays(seed, rows, offset, kept):
    """Rows that drift from replica to replica, a cotangent, and a mask that keeps some rows."""
    rng = np.random.default_rng(seed)
    x = (
        rng.normal(size=(*rows, C)) * rng.uniform(0.5, 2, C)
        + np.linspace(0, 3, rows[0])[:, None, None]
    )
    mask = rng.random((*rows, 1)) < kept
    scale, bias = rng.normal(size=(2, C))
    return (np.float32(a) for a in (x + offset, rng.normal(size=x.shape), scale, bias)), mask


def statistics(x, mask, part, **options):
    """The oracle's running mean and variance after one part of the batch."""
    return oracle.batch_norm(
        x[part].astype(float), None, None, *RUNNING, training=True, mask=mask[part], **options
    )[1][:2]


def judge(y, gradients, parts, x, ct, scale, bias, mask):
    """Compare a result with the oracle's, each part of the batch by itself."""
    dx, *summed = map(np.asarray, gradients)
    total, worst = [np.zeros(C), np.zeros(C)], 1.0
    for part in parts:
        here = x[part].astype(float), scale, bias, *RUNNING
        wanted, _ = oracle.batch_norm(*here, training=True, mask=mask[part])
        back = oracle.batch_norm_vjp(ct[part], *here, training=True, mask=mask[part])
        at = condition_number(here[0], (0, 1), 1e-5, mask=mask[part])
        worst = max(worst, at)
        assert_close(np.asarray(y)[part], wanted, conditioning=at, name="y")
        assert_close(dx[part], back[0], what="derivative", conditioning=at, name="dx")
        total = [t + b for t, b in zip(total, back[1:], strict=True)]
    for got, wanted, name in zip(summed, total, ("dscale", "dbias"), strict=True):
        assert_close(got, wanted, what="derivative", conditioning=worst, name=name)


def run(normalize, mask, x, ct, scale, bias):
    """y, statistics and gradients of a function `(mask, x, scale, bias) -> (y, mean, var)`."""

    def loss(x, scale, bias):
        out = normalize(mask, x, scale, bias)
        return (out[0] * ct).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
    return *out, *gradients


@st.composite
def partitions(draw):
    """Groups of the replicas, equal or not, in any order."""
    order = draw(st.permutations(range(DEVICES)))
    cuts = draw(st.lists(st.integers(1, DEVICES - 1), max_size=4, unique=True).map(sorted))
    return [order[a:b] for a, b in itertools.pairwise([0, *cuts, DEVICES])]


@pytest.mark.seconds(90, "all contexts in turn")
@some_examples
@given(
    groups=partitions(),
    context=st.sampled_from(["vmap", (8,), (4, 2), (2, 2, 2)]),
    check_vma=st.booleans(),
    rows=st.integers(2, 5),
)
def test_groups_of_replicas(groups, context, check_vma, rows):
    def one(x, scale, bias, mask, name):
        y, stats = jaxnorm.batch_norm(
            x, scale, bias, STATS, training=True, mask=mask, axis_name=name,
            axis_index_groups=groups,
        )  # fmt: skip
        return y, stats.mean, stats.var

    if context == "vmap":

        def normalize(mask, x, scale, bias):
            mapped = jax.vmap(partial(one, name="a"), (0, None, None, 0), axis_name="a")
            return mapped(x, scale, bias, mask)
    else:
        names = NAMES[: len(context)]
        mesh = jax.make_mesh(context, names, axis_types=(AxisType.Auto,) * len(names))

        def local(x, scale, bias, mask):
            out = one(x[0], scale, bias, mask[0], names)
            return jax.tree.map(lambda a: a[None], out)

        def normalize(mask, x, scale, bias):
            return jax.shard_map(
                local, mesh=mesh, in_specs=(P(names), P(), P(), P(names)), out_specs=P(names),
                check_vma=check_vma,
            )(x, scale, bias, mask)  # fmt: skip

    compiled = jax.jit(partial(run, normalize))
    for kept, offset, seed in DATA:
        (x, ct, scale, bias), mask = arrays(seed, (DEVICES, rows), offset, kept)
        y, means, variances, *gradients = compiled(mask, x, ct, scale, bias)
        judge(y, gradients, groups, x, ct, scale, bias, mask)
        for group in groups:
            mean, var = statistics(x, mask, group)
            for member in group:
                assert_close(np.asarray(means)[member], mean, name="mean")
                assert_close(np.asarray(variances)[member], var, name="var")


@pytest.mark.seconds(90, "all layouts in turn")
@some_examples
@given(
    shape=st.sampled_from(MESHES),
    placed=st.permutations([0, 1, 2]),
    kind=st.sampled_from([AxisType.Auto, AxisType.Explicit]),
    parts=st.sampled_from([1, 1, 2, 4, 8]),
)
def test_layouts_of_a_mesh(shape, placed, kind, parts):
    """Any axis of the data over any axis of the mesh, with the whole batch or virtual batches."""
    sizes = 8, 8, C
    names = NAMES[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )
    spec = [None] * 3
    for axis, name in zip(placed, names):
        spec[axis] = name if sizes[axis] % mesh.shape[name] == 0 else None
    size = sizes[0] // parts

    def normalize(mask, x, scale, bias):
        y, stats = jaxnorm.batch_norm(
            x, scale, bias, STATS, training=True, mask=mask,
            virtual_batch_size=None if parts == 1 else size,
        )  # fmt: skip
        return y, stats.mean, stats.var

    compiled, chunks = jax.jit(partial(run, normalize)), np.split(np.arange(sizes[0]), parts)
    for kept, offset, seed in DATA:
        (x, ct, scale, bias), mask = arrays(seed, sizes[:2], offset, kept)
        with jax.set_mesh(mesh):
            full_mask = np.broadcast_to(mask, x.shape)
            sharded = (jax.device_put(a, NamedSharding(mesh, P(*spec))) for a in (full_mask, x, ct))
            y, mean, var, *gradients = compiled(*sharded, scale, bias)
        judge(y, gradients, chunks, x, ct, scale, bias, mask)
        counts = np.array([mask[chunk].sum() for chunk in chunks])
        # One update, with the averages over the virtual batches.
        means, variances = zip(*(statistics(x, mask, c, decay=0.0) for c in chunks), strict=True)
        for new, old, batch in zip((mean, var), RUNNING, (means, variances), strict=True):
            average = np.average(batch, axis=0, weights=counts)
            assert_close(new, 0.99 * old + 0.01 * average, name="running")
