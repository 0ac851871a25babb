"""Training over a mesh: the numbers of one device, every leaf on its devices, no gathered batch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from training.deep import (
    MAKE,
    RATE,
    NNXDeep,
    assert_trained,
    data,
    evaluated,
    plain,
    reference,
    squared_error,
)

from jaxnorm.training import Layout, create_train_state, make_eval_step, make_train_step


def mesh(shape, names, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


LAYOUTS = {
    "data parallel": lambda: Layout.data_parallel(),
    "fully sharded": lambda: Layout.fully_sharded(mesh((8,), ("d",), AxisType.Explicit)),
    "fully sharded, two axes": lambda: Layout(
        mesh((4, 2), ("data", "model")), parameter_axes=("data", "model")
    ),
    "parameters over both": lambda: Layout(
        mesh((4, 2), ("data", "model")), "data", ("data", "model"), min_size=32
    ),
    "tensor parallel": lambda: Layout(
        mesh((2, 4), ("data", "model"), AxisType.Explicit), "data", "model", min_size=32
    ),
}
# The largest dimension of first.kernel (16, 64), and who holds a part of it.
KERNEL = {
    "data parallel": PartitionSpec(),
    "fully sharded": PartitionSpec(None, "d"),
    "fully sharded, two axes": PartitionSpec(None, ("data", "model")),
    "parameters over both": PartitionSpec(None, ("model", "data")),
    "tensor parallel": PartitionSpec(None, "model"),
}
OPTIMIZER = optax.sgd(RATE)


def kernel_of(params):
    return plain_leaves(params)["first"]["kernel"]


def plain_leaves(tree):
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def gathered(compiled):
    """Shapes of the results of all-gathers and all-to-alls in a compiled program."""
    shape = r"= \(?(\w+\[[\d,]*\]).* (?:all-gather|all-to-all)(?:-start)?\("
    return {m.group(1) for line in compiled.as_text().splitlines() if (m := re.search(shape, line))}


@pytest.mark.parametrize("name", ["fully sharded, two axes", "tensor parallel"])
def test_random_parameters_are_those_of_one_device(name):
    def create(layout=None):
        return create_train_state(nn.Dense(64), OPTIMIZER, 0, np.ones((1, 16)), layout=layout)

    jax.tree.map(np.testing.assert_array_equal, create(LAYOUTS[name]()).params, create().params)


@pytest.mark.sample
# Two of the layouts are enough for an NNX state.
@pytest.mark.parametrize(
    "framework, name",
    [("linen", name) for name in LAYOUTS]
    + [("nnx", "fully sharded, two axes"), ("nnx", "tensor parallel")],
)
def test_a_mesh_trains_as_one_device(framework, name, compilations):
    layout, model, batches = LAYOUTS[name](), MAKE[framework](), data()
    example = (batches[0]["x"],) if framework == "linen" else ()
    state = create_train_state(model, OPTIMIZER, 0, *example, layout=layout)
    assert kernel_of(state.params).sharding.spec == KERNEL[name]

    expected = reference(plain(state.params), plain(state.batch_stats), [[b] for b in batches])
    shardings = layout.shardings(state)
    step = make_train_step(model, OPTIMIZER, squared_error, layout=layout)
    placed, losses = [layout.batch(batch) for batch in batches], []
    for i, batch in enumerate(placed):
        old = state
        compilations.clear()
        state, metrics = step(state, batch)
        assert i == 0 or not compilations
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings)):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        losses.append(metrics["loss"])
    assert_trained(state, losses, expected)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(placed))

    evaluate = make_eval_step(model, lambda y, b: {"loss": squared_error(y, b)}, layout=layout)
    outputs = evaluated(plain(state.params), plain(state.batch_stats), batches[0]["x"])
    wanted = squared_error(outputs, batches[0])
    np.testing.assert_allclose(evaluate(state, batches[0])["loss"], wanted, rtol=1e-5)


@pytest.mark.parametrize("name", ["data parallel", "fully sharded"])
def test_no_row_leaves_its_device_and_parameters_only_to_be_used(name):
    layout, model = LAYOUTS[name](), MAKE["linen"]()
    (batch,) = data(1)
    # From shapes alone.
    shapes = jax.eval_shape(lambda: create_train_state(model, OPTIMIZER, 0, batch["x"]))
    batch_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    for accumulate in (1, 2):
        step = make_train_step(
            model, OPTIMIZER, squared_error, layout=layout, accumulate=accumulate
        )
        compiled = step.lower(shapes, batch_shapes).compile()
        assert gathered(compiled) == (set() if name == "data parallel" else {"f32[16,64]"})


@pytest.mark.sample
def test_each_device_stores_its_part():
    model, optimizer = Dense(256), optax.adam(1e-3)
    x = np.ones((8, 128), np.float32)

    def bytes_of(layout):
        state = create_train_state(model, optimizer, 0, x, layout=layout)
        step = make_train_step(model, optimizer, lambda y, b: (y**2).mean(), layout=layout)
        state, _ = step(state, x)
        leaves = jax.tree.leaves((state.params, state.opt_state))
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    whole, kernels, biases = bytes_of(Layout.data_parallel()), 3 * 128 * 256 * 4, 3 * 256 * 4
    assert whole - kernels - biases <= 4  # the count of Adam
    assert bytes_of(Layout.fully_sharded()) == whole - kernels * 7 // 8
    assert bytes_of(Layout(Layout.fully_sharded().mesh, None, "data", 1)) == (
        whole - (kernels + biases) * 7 // 8
    )


def test_many_steps_in_one_program_and_what_else_goes_together():
    layout, model = LAYOUTS["fully sharded"](), MAKE["linen"](dropout=0.3)
    batches = data(2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01, eps=1e-3))
    options = {"remat": True, "accumulate": 2, "skip_nonfinite": True}
    spoiled = {**batches[0], "y": np.full_like(batches[0]["y"], np.nan)}
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches, spoiled)
    ends = []
    for place in (layout, None):
        state = create_train_state(model, optimizer, 0, batches[0]["x"], layout=place)
        loop = make_train_step(model, optimizer, squared_error, scan=True, layout=place, **options)
        state, metrics = loop(state, stacked if place is None else place.batch(stacked, scan=True))
        assert metrics["loss"].shape == (3,) and int(state.nonfinite_step) == 2
        ends.append(state)
    shardings = layout.shardings(ends[0])
    jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), ends[0], shardings)
    for a, b in zip(*(jax.tree.leaves((plain(e.params), plain(e.batch_stats))) for e in ends)):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=1e-5)


def test_a_line_search_on_a_mesh():
    layout, model, (batch,) = LAYOUTS["fully sharded"](), Dense(64), data(1)
    batch = {"x": batch["x"] - 1e3, "y": batch["y"]}
    ends = []
    for place in (layout, None):
        state = create_train_state(model, optax.lbfgs(), 0, batch["x"], layout=place)
        step = make_train_step(model, optax.lbfgs(), squared_error, layout=place, accumulate=2)
        for _ in range(2):
            state, metrics = step(state, batch)
        ends.append((plain(state.params), float(metrics["loss"])))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *ends)


def test_under_a_mesh_of_the_caller_and_in_a_jit_of_the_caller():
    explicit = mesh((8,), ("data",), AxisType.Explicit)
    layout, model, (batch,) = Layout.data_parallel(explicit), Dense(1), data(1)
    step = make_train_step(model, OPTIMIZER, squared_error, layout=layout, donate=False)
    state = create_train_state(model, OPTIMIZER, 0, batch["x"], layout=layout)
    _, wanted = step(state, batch)
    typed = jax.device_put(batch, NamedSharding(explicit, PartitionSpec("data")))
    with jax.set_mesh(explicit):
        state = create_train_state(model, OPTIMIZER, 0, batch["x"], layout=layout)
        _, here = step(state, typed)
    _, inside = jax.jit(lambda s, b: step(s, b))(state, layout.batch(batch))
    assert float(here["loss"]) == float(wanted["loss"])
    np.testing.assert_allclose(inside["loss"], wanted["loss"], rtol=1e-6)


def test_an_nnx_instance_keeps_its_values():
    model = NNXDeep(rngs=nnx.Rngs(3))
    state = create_train_state(model, OPTIMIZER, 0, layout=LAYOUTS["fully sharded"]())
    values = plain(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, plain(state.params), values)


def test_the_rule_of_the_layout():
    layout = Layout(mesh((4, 2), ("a", "b")), "a", ("a", "b"), min_size=64)
    spec = lambda *shape, **kw: layout.parameter(shape, **kw).spec  # noqa: E731
    whole = PartitionSpec()
    assert spec(16, 64) == PartitionSpec(None, ("b", "a"))
    assert spec(64, 16) == PartitionSpec(("b", "a"))
    assert spec(16, 16) == PartitionSpec(None, ("b", "a"))
    assert spec(3, 3, 8, 12) == PartitionSpec(None, None, ("b", "a"))
    assert spec(7, 63) == spec(8) == spec() == spec(0, 64) == whole
    assert spec(16, 64, gathered=True) == PartitionSpec(None, "b")
    assert Layout.fully_sharded().parameter((64, 64), gathered=True).spec == PartitionSpec(
        None, None
    )
    narrow = Layout(mesh((8, 1), ("a", "b")), parameter_axes=("b", "a"))
    assert narrow.parameter((64, 64)).spec == PartitionSpec(None, "a")
    placed = layout.batch({"x": np.ones((8, 3)), "weight": 2.0})
    assert placed["x"].sharding.spec == PartitionSpec("a") and placed["weight"].shape == ()
    assert layout.batch(placed)["x"] is placed["x"]
    assert layout.batch(np.ones((3, 8)), scan=True).sharding.spec == PartitionSpec(None, "a")


def test_errors():
    axes = mesh((4, 2), ("data", "model"))
    with pytest.raises(ValueError, match=r"batch_axes must name axes.*'rows'.*'data', 'model'"):
        Layout(axes, batch_axes="rows")
    with pytest.raises(ValueError, match=r"parameter_axes must name axes"):
        Layout(axes, parameter_axes=("data", "data"))
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh; got tuple"):
        Layout((8,))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"make_train_step: layout must be .*Layout; got Mesh"):
        make_train_step(nn.Dense(1), OPTIMIZER, squared_error, layout=axes)
    with pytest.raises(TypeError, match=r"create_train_state: layout must be .*Layout; got Mesh"):
        create_train_state(nn.Dense(1), OPTIMIZER, 0, np.ones((1, 2)), layout=axes)

    layout, (batch,) = Layout.data_parallel(), data(1)
    with pytest.raises(ValueError, match=r"Layout.batch: .* 8 parts .* 12 rows.* multiple of 8"):
        layout.batch(np.ones((12, 3)))
    with pytest.raises(TypeError, match=r"Layout: only the TrainState of one run"):
        layout.shardings({"kernel": np.ones((64, 64))})
    step = make_train_step(Dense(1), OPTIMIZER, squared_error, layout=layout)
    state = create_train_state(Dense(1), OPTIMIZER, 0, batch["x"], layout=layout)
    with pytest.raises(ValueError, match=r"make_train_step: the rows .* got a leaf of shape \(7,"):
        step(state, jax.tree.map(lambda x: x[:7], batch))
    four = make_train_step(nn.Dense(1), OPTIMIZER, squared_error, layout=layout, accumulate=8)
    with pytest.raises(ValueError, match=r"in each of the 8 micro-batches.*multiple of 64"):
        four(state, batch)
    elsewhere = create_train_state(Dense(1), OPTIMIZER, 0, batch["x"])
    with pytest.raises(ValueError, match=r"state.* must lie where the layout .*layout.place"):
        step(elsewhere, batch)
    with pytest.raises(TypeError, match=r"must be a TrainState; got dict"):
        step({}, batch)
    half = Layout.data_parallel(Mesh(np.array(jax.devices()[:4]), ("data",)))
    with pytest.raises(ValueError, match=r"make_eval_step: the state must lie"):
        make_eval_step(nn.Dense(1), lambda y, b: {}, layout=half)(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((state, elsewhere)))
    moved, _ = step(layout.place(elsewhere), batch)
    assert moved.step.sharding.is_equivalent_to(state.step.sharding, 0)
    assert jnp.isfinite(step(state, batch)[1]["loss"])
