"""Collectives that the observation of a sharded batch costs, counted in the compiled program."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import initial
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.monitor import Monitor, attach, observe
from jaxnorm.training import Layout, create_train_state, make_train_step

OPTIMIZER = optax.sgd(0.1)


class Net(nn.Module):
    """All kinds of places, of several shapes."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.BatchNorm(not train)(nn.Dense(8)(x)))
        return nn.Dense(10)(nn.LayerNorm()(nn.Dense(16)(x.mean((1, 2)))))


def loss(y, batch):
    return optax.softmax_cross_entropy_with_integer_labels(y, batch["y"]).mean()


def collectives(text):
    """How many there are of each kind; what is compiled in pieces is one and has one channel."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= .*? ({kinds})(?:-start)?\(.*?channel_id=(\d+)", text)
    return [kind for kind, _ in sorted(set(found))]


def compiled_for(topology, monitor, **options):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    layout = Layout.data_parallel(Mesh(np.array(devices), ("data",)))
    rows = 16 * len(devices)
    state = layout.place(
        jax.eval_shape(lambda: create_train_state(Net(), OPTIMIZER, 0, jnp.zeros((1, 8, 8, 3))))
    )
    batch = {
        "x": jax.ShapeDtypeStruct((rows, 8, 8, 3), jnp.float32),
        "y": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    step = make_train_step(Net(), OPTIMIZER, loss, layout=layout, monitor=monitor, **options)
    traced = step.trace(state, layout.batch(batch))
    return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.seconds(90, "it compiles for TPUs with a sample and without")
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("topology", "options"),
    [("v5e:2x2x1", {}), ("v6e:2x2x1", {"accumulate": 2})],
    ids=str,
)
def test_a_sample_adds_one_collective(topology, options):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    plain, observing = (
        collectives(compiled_for(topology, monitor, **options))
        for monitor in (None, Monitor(every=1, channels=True))
    )
    assert plain and set(plain) == {"all-reduce"}
    assert sorted(observing) == sorted([*plain, "all-gather"])


@pytest.fixture(scope="module")
def cubes():
    """Two batches with channels first, a function to observe, and what one device shows."""
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (16, 6, 5)).astype(np.float32)
    model = nn.Sequential([nn.BatchNorm(use_running_average=False, axis=1), nn.relu])
    variables = initial(model, x)

    def cubes(x):
        return (attach(model).apply(variables, x, mutable=["batch_stats"])[0] ** 3).sum()

    run, both = observe(jax.grad(cubes), channels=True), np.stack([x, 2 * x], 1)
    return both, run, jax.jit(jax.vmap(run, 1))(both)[1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "vmap"])
def test_any_mesh_shows_what_one_device_shows_in_one_gather(cubes, kind, mapped):
    x, run, expected = cubes
    if mapped:
        run = jax.vmap(run, 1)
    else:
        x, expected = x[:, 0], jax.tree.map(lambda a: a[0], expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    observing = jax.jit(run).lower(spread).compile()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        observing(spread)[1], expected,
    )  # fmt: skip
    assert collectives(observing.as_text()).count("all-gather") == 1
    assert not {"all-to-all", "collective-permute"} & set(collectives(observing.as_text()))
