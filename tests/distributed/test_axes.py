"""Statistics over named axes agree with one device that holds the whole batch."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangent
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from programs import Program

import jaxnorm
import jaxnorm.linen as jnn
from jaxnorm.testing import assert_close

N, R, C = 8, 4, 5  # replicas, rows of each, channels
RNG = np.random.default_rng(0)
STATS = jaxnorm.init_batch_stats(C)
# Replicas keep four rows, one, two and none.
MASK = jnp.asarray(
    [[True] * 4, [True, False, False, False], [False, True, True, False], [False] * 4] * 2
)[..., None]
SPLIT = [[0, 2, 4, 6], [1, 3, 5, 7]]
UNEQUAL = [[0, 1, 2, 3, 6], [4, 5, 7]]


def mesh(*shape, names=("d",)):
    return jax.make_mesh(shape or (N,), names, axis_types=(AxisType.Auto,) * len(names))


def batch_norm(x, scale, bias, mask, **options):
    return jaxnorm.batch_norm(x, scale, bias, STATS, training=True, mask=mask, **options)


def vmapped(function, *arrays):
    return jax.vmap(partial(function, name="d"), axis_name="d")(*arrays)


def twice_vmapped(function, *arrays):
    inner = jax.vmap(partial(function, name=("a", "b")), axis_name="b")
    split = (a.reshape(2, N // 2, *a.shape[1:]) for a in arrays)
    out = jax.vmap(inner, axis_name="a")(*split)
    return jax.tree.map(lambda a: a.reshape(N, *a.shape[2:]), out)


def sharded(function, *arrays, check_vma, names=("d",), shape=(N,)):
    """Each device holds one replica, with the arrays that it would have under `vmap`."""

    def local(*arrays):
        out = function(*(a[0] for a in arrays), name=names)
        return jax.tree.map(lambda a: jnp.asarray(a)[None], out)

    return jax.shard_map(
        local, mesh=mesh(*shape, names=names), in_specs=P(names), out_specs=P(names),
        check_vma=check_vma,
    )(*arrays)  # fmt: skip


def pmapped(function, *arrays):
    return jax.pmap(partial(function, name="d"), axis_name="d")(*arrays)


CONTEXTS = {
    "vmap": vmapped,
    "vmap of vmap": twice_vmapped,
    "pmap": pmapped,
    "shard_map": partial(sharded, check_vma=True),
    "shard_map unchecked": partial(sharded, check_vma=False),
    "shard_map of two axes": partial(sharded, check_vma=True, names=("a", "b"), shape=(4, 2)),
    "shard_map of two axes unchecked": partial(
        sharded, check_vma=False, names=("a", "b"), shape=(4, 2)
    ),
}
A_FEW = ["vmap", "pmap", "shard_map", "shard_map of two axes unchecked"]
each_context = pytest.mark.parametrize("context", CONTEXTS)
two_contexts = pytest.mark.parametrize("context", ["vmap", "shard_map of two axes"])
pytestmark = pytest.mark.filterwarnings("ignore:jax.pmap is deprecated")


def replicas(context, options, x, scale, bias, mask):
    """y of all replicas, and the running statistics that each of them computes."""

    def one(x, mask, name):
        y, stats = batch_norm(x, scale, bias, mask, axis_name=name, **options)
        return y, stats.mean, stats.var

    return CONTEXTS[context](one, x, mask)


def one_device(parts, x, scale, bias, mask):
    """The results of each part of the replicas, one after another on one device."""
    every = [None] * N
    for part in parts:
        rows = jnp.array(part)
        y, stats = batch_norm(x[rows].reshape(-1, C), scale, bias, mask[rows].reshape(-1, 1))
        for i, share in zip(part, y.reshape(len(part), R, C), strict=True):
            every[i] = (share, stats.mean, stats.var)
    return tuple(map(jnp.stack, zip(*every, strict=True)))


@cache
def inputs(offset):
    # Each replica's share has a mean of its own, so that a mean of variances would be wrong.
    x = RNG.normal(size=(N, R, C)) + np.arange(N)[:, None, None] + offset
    scale, bias = RNG.normal(size=(2, C)) + 1
    return *(jnp.asarray(a, jnp.float32) for a in (x, scale, bias)), MASK


def derivatives(run, x, scale, bias, mask, second=True):
    """Values, gradients by random cotangents, and a second derivative."""
    ct = cotangent(x.shape)

    def loss(x, scale, bias):
        out = run(x, scale, bias, mask)
        return jnp.vdot(out[0], ct), out

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    first, out = gradient(x, scale, bias)
    if not second:
        return out, first
    again = jax.jvp(lambda x: gradient(x, scale, bias)[0], (x,), (cotangent(x.shape, 9),))[1]
    return out, first, again


@cache
def on_one_device(parts):
    return jax.jit(partial(derivatives, partial(one_device, parts)))


@cache
def on_replicas(context, groups, second):
    run = partial(replicas, context, {"axis_index_groups": groups})
    return jax.jit(partial(derivatives, run, second=second))


def agree(got, wanted):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(g.dtype, jnp.integer):
            assert (g == w).all()
        else:
            assert_close(g, np.asarray(w, np.float64), what="derivative")


def as_tuples(groups):
    return tuple(map(tuple, groups))


GROUPS = {"all": None, "split": SPLIT, "unequal": UNEQUAL}
# A second derivative for each context and each kind of groups, not for all pairs.
SECOND = {
    "all": ("vmap", "shard_map", "shard_map of two axes unchecked"),
    "split": ("vmap of vmap", "shard_map unchecked"),
    "unequal": ("pmap", "shard_map of two axes"),
}


@pytest.mark.sample
@pytest.mark.parametrize("offset", [0.0, 1e4])
@each_context
@pytest.mark.parametrize("groups", GROUPS)
def test_as_on_one_device(context, groups, offset):
    """Values, statistics and derivatives with uneven masks and two replicas without a sample."""
    members, second = GROUPS[groups], context in SECOND[groups]
    got = on_replicas(context, members and as_tuples(members), second)(*inputs(offset))
    wanted = on_one_device(as_tuples(members or [range(N)]))(*inputs(offset))
    agree(got, wanted if second else wanted[:2])


@cache
def virtual_by_hand(size):
    """Each virtual batch by itself, and the mean of their new statistics."""

    def parts(x, scale, bias, mask):
        y, stats = jax.vmap(lambda rows: batch_norm(rows, scale, bias, None, unbiased=True))(
            x.reshape(-1, size, C)
        )
        shared = (jnp.broadcast_to(a.mean(0), (N, C)) for a in stats[:2])
        return y.reshape(x.shape), *shared

    return jax.jit(partial(derivatives, parts, second=False))(*inputs(1e4))


# Fewer rows than a replica has, as many, those of some replicas, and those of all replicas.
SIZES = {
    "one device": (2, 32),
    "vmap": (2, 4, 16, 32),
    "pmap": (4, 16),
    "shard_map": (2, 16, 32),
    "shard_map of two axes unchecked": (4, 16, 32),
}


@pytest.mark.parametrize("context, size", [(c, size) for c in SIZES for size in SIZES[c]])
def test_a_virtual_batch_is_the_same_on_any_number_of_replicas(context, size):
    options = {"virtual_batch_size": size, "unbiased": True}

    def alone(x, scale, bias, mask):
        y, stats = batch_norm(x.reshape(-1, C), scale, bias, None, **options)
        shared = (jnp.broadcast_to(a, (N, C)) for a in (stats.mean, stats.var))
        return y.reshape(x.shape), *shared

    def over(x, scale, bias, mask):
        return replicas(context, options, x, scale, bias, jnp.ones_like(mask))

    run = alone if context == "one device" else over
    agree(jax.jit(partial(derivatives, run, second=False))(*inputs(1e4)), virtual_by_hand(size))


def test_masked_virtual_batches_count_what_they_hold():
    x, scale, bias, mask = inputs(0.0)

    @jax.jit
    def both(x, scale, bias, mask):
        y, stats = batch_norm(
            x.reshape(-1, C), scale, bias, mask.reshape(-1, 1), virtual_batch_size=R, decay=0.0
        )
        alone = jax.vmap(lambda x, mask: batch_norm(x, scale, bias, mask)[0])(x, mask)
        return y.reshape(x.shape), stats, alone

    y, stats, alone = both(x, scale, bias, mask)
    assert_close(y, np.asarray(alone, np.float64))
    kept = np.asarray(mask[..., 0])
    rows = np.asarray(x, np.float64)
    within = [rows[i][kept[i]].var(0) * kept[i].sum() for i in range(N) if kept[i].any()]
    assert_close(stats.mean, rows[kept].mean(0))
    assert_close(stats.var, sum(within) / kept.sum())


def apply(norm, x, mask, name=None):
    call = {
        "layer": partial(jaxnorm.layer_norm, axis=1),
        "rms": partial(jaxnorm.rms_norm, axis=1),
        "group": partial(jaxnorm.group_norm, num_groups=2),
        "instance": jaxnorm.instance_norm,
    }[norm]
    return call(x[None], mask=mask[None], axis_name=name)[0]


def wider():
    x, _, _, mask = inputs(1e4)
    x = np.concatenate([x, x[..., :1] * 2], -1)  # six channels make two groups
    return x, np.float32(0), np.float32(0), mask


@cache
def apply_alone(norm):
    def alone(x, scale, bias, mask):
        return (apply(norm, x.reshape(N * R, -1), mask.reshape(-1, 1)).reshape(x.shape),)

    return jax.jit(partial(derivatives, alone, second=False))(*wider())


@pytest.mark.parametrize("context", ["vmap", "shard_map", "shard_map of two axes unchecked"])
@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance"])
def test_examples_that_go_on_over_replicas(context, norm):
    """Norms without a state, with the rows of an example sharded over the axis."""

    def run(x, scale, bias, mask):
        return (CONTEXTS[context](partial(apply, norm), x, mask),)

    agree(jax.jit(partial(derivatives, run, second=False))(*wider()), apply_alone(norm))


@pytest.mark.parametrize("context", A_FEW)
def test_moments_merge_over_an_axis(context):
    x, *_, mask = inputs(1e4)

    def one(x, mask, name):
        return tuple(jaxnorm.moments(x, 0, mask=mask, axis_name=name))

    got = jax.jit(partial(CONTEXTS[context], one))(x, mask)
    whole = jax.jit(lambda x, mask: jaxnorm.moments(x, 0, mask=mask))(
        x.reshape(-1, C), mask.reshape(-1, 1)
    )
    agree([np.asarray(a)[3] for a in got], list(whole))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_derivative_of_a_compiled_vmap(norm):
    """A derivative taken outside of `jit`, where the axis has lost its name."""
    x, scale, bias, _ = inputs(0.0)
    epsilon = 1.7e-5  # like nowhere else: a rule that was traced in time before would be found

    def one(x):
        if norm == "instance":
            return jaxnorm.instance_norm(x[None], axis_name="d", epsilon=epsilon)[0]
        return batch_norm(x, scale, bias, None, axis_name="d", epsilon=epsilon)[0]

    ct = cotangent(x.shape)
    mapped = jax.jit(jax.vmap(one, axis_name="d"))
    inside = jax.jit(lambda x, ct: jax.vjp(jax.vmap(one, axis_name="d"), x)[1](ct))
    outside = jax.vjp(mapped, x)[1](ct)
    agree(outside, inside(x, ct))
    agree(jax.jvp(mapped, (x,), (ct,))[1], jax.jit(lambda x: jax.jvp(mapped, (x,), (ct,))[1])(x))


def test_a_state_for_each_device():
    """Statistics as `pmap` keeps them: equal, although their types allow different values."""
    x, *_ = inputs(1e4)
    stacked = jax.tree.map(lambda a: np.stack([a] * N), STATS)

    def local(x, stats):
        stats = jax.tree.map(lambda a: a[0], stats)
        y, new = jaxnorm.batch_norm(x, None, None, stats, training=True, axis_name="d")
        return y, jax.tree.map(lambda a: a[None], new)

    y, new = jax.jit(jax.shard_map(local, mesh=mesh(), in_specs=P("d"), out_specs=P("d")))(
        x.reshape(-1, C), stacked
    )
    wanted, alone = jax.jit(lambda x: batch_norm(x, None, None, None))(x.reshape(-1, C))
    agree((y, [np.asarray(a)[3] for a in new]), (wanted, list(alone)))


def test_channels_over_one_axis_and_rows_over_another():
    x = np.asarray(inputs(1e4)[0]).reshape(-1, C)[:, :4]
    stats = jaxnorm.init_batch_stats(4)
    run = jax.shard_map(
        lambda x, s: jaxnorm.batch_norm(x, None, None, s, training=True, axis_name="a"),
        mesh=mesh(4, 2, names=("a", "b")),
        in_specs=(P("a", "b"), jaxnorm.BatchStats(P("b"), P("b"), P())),
        out_specs=(P("a", "b"), jaxnorm.BatchStats(P("b"), P("b"), P())),
    )
    alone = jax.jit(lambda x, s: jaxnorm.batch_norm(x, None, None, s, training=True))
    agree(jax.jit(run)(x, stats), alone(x, stats))


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_collective_each_way(check_vma):
    """Count collectives in the compiled program, without the branch for a poor guess."""

    def gradient(x, scale, ct):
        def loss(x):
            return jnp.vdot(batch_norm(x, scale, None, None, axis_name="d")[0], ct)

        return jax.grad(loss)(x)

    run = jax.shard_map(
        gradient, mesh=mesh(), in_specs=(P("d"), P(), P("d")), out_specs=P("d"),
        check_vma=check_vma,
    )  # fmt: skip
    x = jnp.ones((N * R, C))
    text = jax.jit(run).lower(x, jnp.ones(C), x).compile().as_text()
    found = [c for c in Program(text).collectives if not c.in_branch]
    assert [c.kind for c in found] == ["all-reduce"] * 2
    assert [sum(a.elements for a in c.arrays) for c in found] == [2 * C] * 2


def test_initializing_where_the_name_is_bound():
    layer = jnn.BatchNorm(use_running_average=False, axis_name="d")
    x = inputs(0.0)[0].reshape(-1, C)
    run = jax.shard_map(
        lambda x: layer.init(jax.random.key(0), x), mesh=mesh(), in_specs=P("d"), out_specs=P()
    )
    agree(jax.jit(run)(x), jax.jit(layer.init)(jax.random.key(0), x))


@pytest.mark.parametrize("norm", ["batch", "virtual", "layer", "rms"])
def test_more_elements_than_an_int32_counts(norm):
    x = jax.ShapeDtypeStruct((2**16, 2**16, C), jnp.float32)
    call = {
        "batch": lambda x: batch_norm(x, None, None, None, unbiased=True)[0],
        "virtual": lambda x: batch_norm(
            x, None, None, None, unbiased=True, virtual_batch_size=2**15
        )[0],
        "layer": partial(jaxnorm.layer_norm, axis=(0, 1)),
        "rms": partial(jaxnorm.rms_norm, axis=(0, 1)),
    }[norm]
    assert jax.eval_shape(jax.grad(lambda x: call(x).sum()), x).shape == x.shape


def test_virtual_batches_of_the_largest_numbers():
    x = np.repeat(np.float32([[3e38], [-3e38]]), 4, 0)
    stats = jaxnorm.init_batch_stats(1)
    norm = partial(jaxnorm.batch_norm, training=True, virtual_batch_size=4)
    _, new = jax.jit(norm)(x, None, None, stats)
    assert new.mean == 0
    assert_close(new.var, np.array([0.99]))


@pytest.mark.unchecked_types
class TestRefused:
    """Calls that are refused when they are traced, before anything is computed."""

    x = jnp.ones((N, R, C))

    def traced(self, context, options):
        arrays = self.x, None, None, MASK
        return jax.eval_shape(partial(replicas, context, options), *arrays)

    @pytest.mark.parametrize(
        "groups", [[[0, 1], [2, 3]], [[0, 1, 2, 3], [3, 4, 5, 6, 7]], [[*range(8)], []]]
    )
    @two_contexts
    def test_groups_that_do_not_split_the_axis(self, context, groups):
        with pytest.raises(ValueError, match=r"^batch_norm: axis_index_groups must hold each of"):
            self.traced(context, {"axis_index_groups": groups})

    def test_groups_of_something_else(self):
        with pytest.raises(TypeError, match=r"^batch_norm: axis_index_groups must be a list of"):
            self.traced("vmap", {"axis_index_groups": [0, 1]})

    @pytest.mark.parametrize("size", [3, 5, 12, 0, -4, 64])
    @two_contexts
    def test_a_virtual_batch_that_divides_nothing(self, context, size):
        with pytest.raises(ValueError, match=r"must divide the 32 examples.*Choose one of 1, 2, 4"):
            self.traced(context, {"virtual_batch_size": size})

    @pytest.mark.parametrize("size", [2.0, True, "4"])
    def test_a_virtual_batch_that_is_no_number(self, size):
        with pytest.raises(TypeError, match=r"^batch_norm: virtual_batch_size must be an int"):
            batch_norm(self.x[0], None, None, None, virtual_batch_size=size)

    def test_a_virtual_batch_and_groups(self):
        options = {"virtual_batch_size": 4, "axis_index_groups": SPLIT}
        with pytest.raises(ValueError, match=r"virtual_batch_size forms its own groups"):
            self.traced("vmap", options)

    @pytest.mark.parametrize("name", ["e", ("d", "e")])
    def test_a_name_that_is_bound_elsewhere_but_not_here(self, name):
        def local(x):
            return batch_norm(x, None, None, None, axis_name=name)[0]

        inside = jax.shard_map(local, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
        with pytest.raises(ValueError, match=r"axis_name='e' is not bound where this is traced"):
            jax.eval_shape(inside, self.x.reshape(-1, C))

    @pytest.mark.parametrize("name", [("d", "d"), [["d"]], (None,)])
    def test_names_that_are_none(self, name):
        with pytest.raises((TypeError, ValueError), match=r"^batch_norm: axis_name"):
            batch_norm(self.x[0], None, None, None, axis_name=name)

    @pytest.mark.sample
    def test_a_batch_over_devices_that_nobody_synchronizes(self):
        def local(x, **options):
            return batch_norm(x, None, None, None, **options)[0]

        def inside(**options):
            mapped = jax.shard_map(
                partial(local, **options), mesh=mesh(), in_specs=P("d"), out_specs=P("d")
            )
            return jax.eval_shape(mapped, self.x.reshape(-1, C))

        with pytest.raises(ValueError, match=r"varies over \['d'\].*virtual_batch_size"):
            inside()
        inside(axis_name="d")
        inside(axis_name="d", virtual_batch_size=R)

    def test_a_vmapped_axis_where_jax_has_no_sum_over_it(self):
        def local(x):
            return jax.vmap(
                lambda x: batch_norm(x, None, None, None, axis_name=("d", "v"))[0], axis_name="v"
            )(x)

        inside = jax.shard_map(local, mesh=mesh(), in_specs=P("d"), out_specs=P("d"))
        with pytest.raises(ValueError, match=r"check_vma=True JAX has no sum over an axis of jax"):
            jax.eval_shape(inside, self.x)
