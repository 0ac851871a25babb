"""Models of other shapes: shared, subclassed, scanned, rematerialized, narrow, boxed, sharded."""

import json
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import launching
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tools.drifting import LINEN, NNX, batches, pooled

from jaxnorm.testing import assert_close
from jaxnorm.tools import recalibrate
from jaxnorm.training import Layout

DATA = batches(shape=(3,))


def statistics(new, *path):
    stats = new.variables["batch_stats"]
    for name in path:
        stats = stats[name]
    return np.asarray(stats["mean"]), np.asarray(stats["var"])


def assert_statistics(found, wanted, **options):
    for a, b in zip(found, wanted, strict=True):
        assert_close(np.asarray(a), b, **options)


class Doubling(nn.BatchNorm):
    """A subclass that gives its parent something else than it is given."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        return super().__call__(2 * x, use_running_average=deterministic)


class Various(nn.Module):
    """A shared norm, a subclass, a rematerialized one, and one that evaluation never calls."""

    @nn.compact
    def __call__(self, x, train):
        shared = LINEN.BatchNorm(not train, name="shared")
        Doubling(name="subclass")(x, not train)
        nn.remat(nn.BatchNorm)(use_running_average=not train, name="remat")(x)
        if train or self.is_initializing():
            nn.BatchNorm(not train, name="unused")(x)
        return shared(x + 1) + shared(3 * x)


def test_shared_subclassed_rematerialized_and_unused():
    variables = Various().init(jax.random.key(0), DATA[0], True)
    for sequential in (False, True):
        new = recalibrate(Various(), variables, DATA, sequential=sequential)
        calls = [f(x) for x in DATA for f in (lambda x: x + np.float32(1), lambda x: 3 * x)]
        assert_statistics(statistics(new, "shared"), pooled(calls))
        assert_statistics(statistics(new, "subclass"), pooled([2 * x for x in DATA]))
        assert_statistics(statistics(new, "remat"), pooled(DATA))
        assert new.report.kept == ("unused",) and new.report.passes == 1
        assert [each.layer for each in new.report.layers] == ["subclass", "remat", "shared"]
        for a, b in zip(
            *(jax.tree.leaves(v["batch_stats"]["unused"]) for v in (variables, new.variables))
        ):
            np.testing.assert_array_equal(a, b)


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="again")
        return norm(norm(x))


def test_no_order_for_a_norm_that_feeds_itself():
    variables = Chain().init(jax.random.key(0), DATA[0])
    with pytest.raises(
        ValueError, match=r"^recalibrate: .* own statistics.* got again.*sequential=F"
    ):
        recalibrate(Chain(), variables, DATA, sequential=True)
    new = recalibrate(Chain(), variables, DATA)
    own = [(x - x.mean(0)) / np.sqrt(x.astype(float).var(0) + 1e-5) for x in DATA]
    assert_statistics(statistics(new, "again"), pooled([*DATA, *own]), conditioning=4)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.BatchNorm(use_running_average=True, name="a")(jnp.tanh(nn.Dense(3)(x)))
        return nn.BatchNorm(use_running_average=True, name="b")(x + 1 + x**2), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(Step), variable_axes={"params": 0, "batch_stats": 0},
                       split_rngs={"params": True}, length=3)  # fmt: skip
        return scan(name="stack")(x, None)[0]


@pytest.mark.parametrize("sequential", [False, True])
def test_a_stack_in_a_scan(sequential):
    # Larger batches: in one of few rows some channel is nearly constant, and rounding is amplified.
    data = batches(shape=(3,), sizes=(40, 40, 24))
    variables = Stack().init(jax.random.key(0), data[0])
    new = recalibrate(Stack(), variables, data, sequential=sequential)
    # Two norms in each of three layers; the pass after the last would change nothing.
    assert new.report.passes == (6 if sequential else 1)
    dense = variables["params"]["stack"]["Dense_0"]
    here = [x.astype(float) for x in data]

    def norm(name, i, here):
        whole = pooled(here)
        found = tuple(s[i] for s in statistics(new, "stack", name))
        assert_statistics(found, whole, conditioning=8)
        own = [whole if sequential else pooled([x]) for x in here]
        return [(x - m) / np.sqrt(v + 1e-5) for x, (m, v) in zip(here, own)]

    for i in range(3):
        kernel, bias = (np.asarray(dense[k][i], float) for k in ("kernel", "bias"))
        here = norm("a", i, [np.tanh(x @ kernel + bias) for x in here])
        here = norm("b", i, [x + 1 + x**2 for x in here])


class NNXDoubling(nnx.BatchNorm):
    """As `Doubling`, of NNX."""

    def __call__(self, x):
        return super().__call__(2 * x)


class NNXVarious(nnx.Module):
    """One norm at two places, a subclass, a stack, a mode set at construction, and one unused."""

    def __init__(self, rngs):
        make = partial(nnx.BatchNorm, 3, rngs=rngs)
        self.first = self.second = NNX.BatchNorm(3, rngs=rngs)
        self.subclass = NNXDoubling(3, rngs=rngs)
        self.fixed = make(use_running_average=True)
        self.unused = make()
        self.stack = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs))(rngs.split(2))

    def __call__(self, x, *, mask=None):
        self.subclass(x), self.fixed(x, mask=mask)
        stacked = nnx.StateAxes({nnx.RngState: None, ...: 0})
        run = nnx.scan(
            lambda x, norm: norm(x + 1), in_axes=(nnx.Carry, stacked), out_axes=nnx.Carry
        )
        return run(self.first(x) + self.second(3 * x), self.stack)


@pytest.mark.parametrize("sequential", [False, True])
def test_nnx_modules_in_a_graph(sequential):
    model = NNXVarious(nnx.Rngs(0))
    model.eval()
    masks = [np.arange(len(x))[:, None] % 3 > 0 for x in DATA]
    data = [{"x": x, "mask": m} for x, m in zip(DATA, masks)]
    new = recalibrate(model, data, inputs=lambda batch: batch, sequential=sequential).model
    report = recalibrate(model, data, inputs=lambda batch: batch).report

    def stats(norm):
        return norm.mean[...], norm.var[...]

    assert_statistics(stats(new.first), pooled([f * x for x in DATA for f in (1, 3)]))
    assert_statistics(stats(new.subclass), pooled([2 * x for x in DATA]))
    assert_statistics(stats(new.fixed), pooled([x[m[:, 0]] for x, m in zip(DATA, masks)]))
    assert new.first is new.second and new.fixed.use_running_average
    assert report.kept == ("unused",)
    here = [x.astype(float) for x in DATA]
    calls = [[f * x for x in here] for f in (1, 3)]
    whole = pooled([*calls[0], *calls[1]])
    own = [[whole if sequential else pooled([x]) for x in c] for c in calls]
    out = [[(x - m) / np.sqrt(v + 1e-5) for x, (m, v) in zip(c, o)] for c, o in zip(calls, own)]
    here = [a + b for a, b in zip(*out)]
    for i in range(2):
        here = [x + 1 for x in here]
        whole = pooled(here)
        assert_statistics([s[i] for s in stats(new.stack)], whole, conditioning=16)
        own = [whole if sequential else pooled([x]) for x in here]
        here = [(x - m) / np.sqrt(v + 1e-5) for x, (m, v) in zip(here, own)]


def test_a_narrow_model_keeps_its_dtypes_and_boxes():
    model = nn.BatchNorm(
        use_running_average=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16,
        force_float32_reductions=False,
    )  # fmt: skip
    data = [jnp.asarray(x, jnp.bfloat16) for x in DATA]
    variables = model.init(jax.random.key(0), data[0])
    boxed = jax.tree.map(lambda a: nn.Partitioned(a, ("c",)), variables["batch_stats"])
    variables = {**variables, "batch_stats": boxed}
    new = recalibrate(model, variables, data)
    for name, wanted in zip(("mean", "var"), pooled(data)):
        box = new.variables["batch_stats"][name]
        assert isinstance(box, nn.Partitioned) and box.names == ("c",)
        assert box.value.dtype == jnp.bfloat16
        assert_close(np.asarray(box.value), wanted)


class Synchronized(nn.Module):
    """A norm for a `shard_map`, which elsewhere has no axis; and virtual batches."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, axis_name="data", name="a")(x)
        x = LINEN.BatchNorm(use_running_average=True, virtual_batch_size=4, name="b")(x)
        return LINEN.BatchNorm(use_running_average=True, name="c")(x)


def test_batches_on_a_mesh():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data = batches(shape=(3,), sizes=(8, 8, 4))
    variables = Synchronized().init(jax.random.key(0), data[0])
    whole = NamedSharding(mesh, P())
    placed = jax.device_put(variables, whole)
    sharded = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in data]
    one, many = (recalibrate(Synchronized(), *v) for v in ((variables, data), (placed, sharded)))
    layout, last = Layout.data_parallel(mesh), data[0][:3]
    norm = nn.BatchNorm(use_running_average=True)
    alone = {name: variables[name]["a"] for name in ("params", "batch_stats")}
    ragged = recalibrate(norm, jax.device_put(alone, whole), [*data, last], layout=layout)
    own = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in (x.astype(float) for x in data)]
    for name, wanted in (("a", pooled(data)), ("b", pooled(own))):
        assert_statistics(statistics(one, name), wanted, conditioning=4)
        assert_statistics(statistics(many, name), wanted, conditioning=4)
    # What virtual batches of four make of it.
    parts = [p for x in own for p in x.reshape(-1, 4, 3)]
    out = [(p - p.mean(0)) / np.sqrt(p.var(0) + 1e-5) for p in parts]
    assert_statistics(statistics(one, "c"), pooled(out), conditioning=8)
    assert many.variables["batch_stats"]["a"]["mean"].sharding == whole
    assert_statistics(statistics(ragged), pooled([*data, last]))


class InShardMap(nnx.Module):
    """A norm whose axis is bound where it is called."""

    def __init__(self, mesh, rngs):
        self.norm = nnx.BatchNorm(3, axis_name="data", rngs=rngs)
        self.mesh = mesh

    def __call__(self, x):
        specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
        return nnx.shard_map(lambda n, x: n(x), mesh=self.mesh, **specs)(self.norm, x)


def test_a_norm_in_a_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    data = batches(shape=(3,), sizes=(8, 8, 4))
    new = recalibrate(InShardMap(mesh, nnx.Rngs(0)), data)
    assert_statistics((new.model.norm.mean[...], new.model.norm.var[...]), pooled(data))
    assert new.report.layers[0].count == 20


def test_groups_of_an_axis_that_is_not_bound():
    model = nn.BatchNorm(True, axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    variables = model.init(jax.random.key(0), DATA[0])
    with pytest.raises(ValueError, match=r"^recalibrate: .* axis_index_groups .*sequential"):
        recalibrate(model, variables, DATA)
    new = recalibrate(model, variables, DATA, sequential=True)
    assert_statistics(statistics(new), pooled(DATA))


class Carried(nn.Module):
    """One norm that a loop calls twice, and carries."""

    @nn.compact
    def __call__(self, x):
        def step(norm, x, _):
            return norm(x) + x, None

        norm = nn.BatchNorm(use_running_average=True, name="norm")
        carried = {"variable_broadcast": "params", "variable_carry": "batch_stats"}
        return nn.scan(step, **carried, split_rngs={"params": False}, length=2)(norm, x, None)[0]


def test_a_norm_that_a_loop_carries():
    first = nn.BatchNorm(use_running_average=True).init(jax.random.key(0), DATA[0])
    variables = {name: {"norm": values} for name, values in first.items()}
    new = recalibrate(Carried(), variables, DATA)
    # What the second call sees.
    own = [(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) + x for x in (x.astype(float) for x in DATA)]
    assert_statistics(statistics(new, "norm"), pooled([*DATA, *own]), conditioning=4)
    with pytest.raises(ValueError, match="own statistics"):
        recalibrate(Carried(), variables, DATA, sequential=True)


def test_complex_numbers():
    data = [(x + 1j * x[:, ::-1]).astype(np.complex64) for x in DATA]
    model = LINEN.BatchNorm(use_running_average=True)
    new = recalibrate(model, model.init(jax.random.key(0), data[0]), data)
    whole = np.concatenate(data).astype(complex)
    wanted = whole.mean(0), np.square(np.abs(whole - whole.mean(0))).mean(0)
    assert_statistics(statistics(new), wanted)


def test_two_processes(tmp_path):
    done = launching.run(__file__, tmp_path, devices=2)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]
    assert len(said) == 2 and said[0] == said[1]
    data = batches(shape=(3,), sizes=(8, 4))
    assert_close(np.float32(said[0]["mean"]), pooled(data)[0])
    assert_close(np.float32(said[0]["var"]), pooled(data)[1])
    assert "batch 1" in said[0]["refused"]


def process(folder):
    """What each of two processes does with its half of every batch."""
    from jaxnorm.distributed import initialize

    initialize()
    rank = jax.process_index()
    layout = Layout.data_parallel()
    model = nn.BatchNorm(use_running_average=True)
    data = [np.split(x, 2)[rank] for x in batches(shape=(3,), sizes=(8, 4))]
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), data[0]))
    placed = jax.tree.map(
        lambda a: jax.make_array_from_callback(
            a.shape, NamedSharding(layout.mesh, P()), lambda i: a[i]
        ),
        variables,
    )
    new = recalibrate(model, placed, data, layout=layout, sequential=True)
    said = {k: np.asarray(v).tolist() for k, v in new.variables["batch_stats"].items()}
    # One process alone has the number that is none.
    data[1] = data[1] * np.float32(np.nan if rank else 1)
    try:
        recalibrate(model, placed, data, layout=layout)
    except ValueError as error:
        said["refused"] = str(error)
    with open(f"{folder}/{rank}", "w") as file:
        json.dump(said, file)


if __name__ == "__main__":
    process(sys.argv[1])
