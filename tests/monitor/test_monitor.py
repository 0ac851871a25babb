"""The monitor inside a training step: it takes samples when it should, and changes nothing."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from drawn import initial

from jaxnorm.monitor import Monitor, attach, observe
from jaxnorm.training import (
    Layout,
    create_sweep_state,
    create_train_state,
    make_sweep_step,
    make_train_step,
    sweep_member,
)


class Net(nn.Module):
    """Without a batch norm, so that halves of a batch show what the whole shows."""

    norm: type[nn.Module] = nn.LayerNorm

    @nn.compact
    def __call__(self, x, train: bool):
        options = {"use_running_average": not train} if self.norm is nn.BatchNorm else {}
        x = nn.relu(self.norm(**options)(nn.Dense(5)(x)))
        return nn.Dense(2)(x)


RNG = np.random.default_rng(0)
BATCH = {
    "x": RNG.normal(size=(16, 3)).astype(np.float32),
    "y": RNG.normal(size=(16, 2)).astype(np.float32),
}


TRACES = []


def loss(y, batch):
    TRACES.append(y.shape)
    return ((y - batch["y"]) ** 2).mean()


def run(steps, monitor, *, model=Net(), batch=BATCH, **options):
    """States after each step, of which the last alone is readable if they are donated; metrics."""
    optimizer, states = optax.sgd(0.1), []
    state = create_train_state(model, optimizer, 0, BATCH["x"], layout=options.get("layout"))
    step = make_train_step(model, optimizer, loss, monitor=monitor, **options)
    for i in range(steps):
        traces = len(TRACES)
        state, metrics = step(state, batch)
        states.append(state)
        assert i == 0 or len(TRACES) == traces, "traced again"
    return states, metrics


@pytest.fixture(scope="module")
def plain():
    """Seven steps without a monitor."""
    return run(7, None, donate=False)


@pytest.fixture(scope="module")
def everything():
    """Seven steps with a sample of each, by channel too."""
    return run(7, Monitor(every=1, channels=True), donate=False)


def columns(state, every=1):
    """What was seen at each so many samples, by path, and the steps at which it was."""
    steps, rows, lost = state.monitor.read()
    return state.monitor.schema.split(rows[::every]), steps[::every].tolist(), lost


def same(a, b, rtol=1e-4, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


@pytest.mark.sample
@pytest.mark.parametrize("every", [1, 3])
def test_it_samples_every_so_often_and_changes_nothing(plain, everything, every):
    states, metrics = everything if every == 1 else run(7, Monitor(every=every))
    same(plain[0][-1].params, states[-1].params, rtol=1e-6, atol=1e-7)
    same(plain[1], metrics, rtol=1e-6)
    assert columns(states[-1])[1] == list(range(0, 7, every))


def test_the_other_steps_run_the_plain_program():
    state = jax.eval_shape(lambda: create_train_state(Net(), optax.sgd(0.1), 0, BATCH["x"]))
    step = make_train_step(Net(), optax.sgd(0.1), loss, monitor=Monitor(every=3))
    alone = make_train_step(Net(), optax.sgd(0.1), loss).trace(state, BATCH).jaxpr
    names = [e.primitive.name for e in alone.eqns]
    (platforms,) = [e for e in step.trace(state, BATCH).jaxpr.eqns if e.primitive.name == "cond"]
    cpu, others = platforms.params["branches"]
    (eqn,) = [e for e in others.jaxpr.eqns if e.primitive.name == "cond"]
    loops = [e.params["body_jaxpr"] for e in cpu.jaxpr.eqns if e.primitive.name == "while"]
    for plain, sampling in (eqn.params["branches"], loops):
        plain, sampling = ([e.primitive.name for e in b.jaxpr.eqns] for b in (plain, sampling))
        # And the loop counts its turns.
        assert [n for n in plain if n != "jaxnorm_mark"] in (names, ["add", *names])
        assert len(sampling) > len(names) + 20


def test_a_full_ring_loses_the_oldest_and_says_so(everything):
    state = run(7, Monitor(every=1, capacity=4, channels=True))[0][-1]
    steps, rows, lost = state.monitor.read()
    assert steps.tolist() == [3, 4, 5, 6] and lost == 3 and len(rows) == 4
    steps, _, lost = state.monitor.read(since=5)
    assert steps.tolist() == [5, 6] and lost == 0
    np.testing.assert_allclose(everything[0][-1].monitor.read()[1][3:], rows, rtol=1e-5)


def test_norms_of_parameters_gradients_and_updates(plain, everything):
    state = everything[0][-1]
    seen, _, _ = columns(state)
    before = plain[0][0].params

    @jax.jit
    @jax.grad
    def gradient(params):
        return loss(Net().apply({"params": params}, BATCH["x"], True), BATCH)

    paths = state.monitor.schema.parameters
    assert paths[0] == "Dense_0/bias"
    for i, (w, g) in enumerate(zip(*map(jax.tree.leaves, (before, gradient(before))))):
        for name, array, factor in (("weight", w, 1), ("gradient", g, 1), ("update", g, 0.1)):
            norm = factor * np.linalg.norm(array)
            np.testing.assert_allclose(
                seen[f"parameters|{name}"][1, i], norm, rtol=1e-4, atol=1e-7, err_msg=paths[i]
            )


def test_micro_batches_show_what_the_whole_batch_shows(everything):
    halves, _ = run(2, Monitor(every=1, channels=True), accumulate=2)
    a, b = columns(everything[0][1])[0], columns(halves[-1])[0]
    for name in a:
        if name.startswith("observations|") or name == "metrics|loss":
            close = (
                {"rtol": 1e-3, "atol": 1e-6}
                if "gradients" in name
                else {"rtol": 1e-4, "atol": 1e-5}
            )
            np.testing.assert_allclose(a[name], b[name], **close, err_msg=name)
    assert (
        np.abs(a["observations|gradients|moments|m2"]).min() > 1e-4
    )  # so that a factor would be seen


@pytest.mark.sample
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm])
def test_a_mesh_shows_what_one_device_shows(everything, norm):
    model, monitor = Net(norm), Monitor(every=1, channels=True)
    one, _ = everything if norm is nn.LayerNorm else run(2, monitor, model=model)
    many, _ = run(2, monitor, model=model, layout=Layout.data_parallel())
    same(columns(one[1])[0], columns(many[1])[0])


@pytest.mark.parametrize("scan", [False, True])
def test_every_member_of_a_sweep_is_sampled(everything, scan):
    rates, monitor = {"learning_rate": [0.1, 0.3]}, Monitor(every=2, channels=True)
    state = create_sweep_state(Net(), optax.sgd, [0, 0], rates, BATCH["x"])
    step = make_sweep_step(Net(), optax.sgd, loss, monitor=monitor, scan=scan)
    if scan:
        state, _ = step(state, jax.tree.map(lambda x: np.stack([x] * 3), BATCH))
    else:
        for _ in range(3):
            state, _ = step(state, BATCH)
    alone, member = columns(everything[0][2], every=2), columns(sweep_member(state, 0))
    assert member[1:] == alone[1:] == ([0, 2], 0)
    same(member[0], alone[0], rtol=1e-3)
    other, _, _ = columns(sweep_member(state, 1))
    assert not np.allclose(other["metrics|loss"][1], member[0]["metrics|loss"][1])
    # A sample is taken in a branch, and not taken at each step and thrown away.
    text = str(jax.make_jaxpr(step.compiled)(state, BATCH)) if not scan else "cond["
    assert "cond[" in text


def test_many_steps_in_one_loop(everything):
    batches = jax.tree.map(lambda x: np.stack([x] * 5), BATCH)
    (looped,), _ = run(1, Monitor(every=2, channels=True), scan=True, batch=batches)
    assert columns(looped)[1] == [0, 2, 4]
    same(columns(looped)[0], columns(everything[0][4], every=2)[0])


def test_a_shard_map_of_ones_own_is_pooled_by_count():
    model = attach(Net())
    variables = initial(Net(), BATCH["x"], True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    def step(variables, x):
        return jax.grad(lambda x: model.apply(variables, x, True).sum())(x)

    def spread(variables, x):
        none = jax.sharding.PartitionSpec()
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(none, spec), out_specs=spec)
        return mapped(variables, x)

    whole, expected = jax.jit(observe(step))(variables, BATCH["x"])
    parts, seen = jax.jit(observe(spread))(variables, BATCH["x"])
    same(whole, parts)
    same(expected.values, seen.values)
    same(expected.gradients, seen.gradients)
    # In one collective.
    text = jax.jit(observe(spread)).lower(variables, BATCH["x"]).as_text()
    assert text.count("stablehlo.all_reduce") == 1


@pytest.mark.parametrize("elements", [None, 512])
def test_a_part_of_the_elements_tells_about_the_whole(elements):
    rng = np.random.default_rng(3)
    x = rng.normal(2.0, 3.0, (24, 10, 10, 8)).astype(np.float32)
    model = nn.Sequential([nn.LayerNorm(), nn.relu])
    _, seen = jax.jit(observe(attach(model).apply, elements=elements))(initial(model, x), x)
    value = seen["layers_0:input"].value
    assert value.size == x.size
    if elements is None:
        assert value.moments.count == x.size
        np.testing.assert_allclose(value.maximum, x.max(), rtol=1e-6)
    assert value.moments.count <= 2 * (elements or x.size)
    n = float(value.moments.count)
    np.testing.assert_allclose(value.moments.mean, 2.0, atol=5 * 3 / n**0.5)
    np.testing.assert_allclose(value.moments.var, 9.0, rtol=5 * (2 / n) ** 0.5)


def test_layers_can_be_chosen():
    def seen(layers):
        model = attach(Net(nn.BatchNorm), layers)
        variables = initial(Net(nn.BatchNorm), BATCH["x"], True)
        run = observe(lambda variables: model.apply(variables, BATCH["x"], False))
        return list(jax.eval_shape(run, variables)[1])

    assert seen("Dense_*") == ["Dense_0:input", "Dense_0:output", "Dense_1:input", "Dense_1:output"]
    assert seen((nn.BatchNorm,)) == ["BatchNorm_0:input", "BatchNorm_0:output"]
    assert seen(("relu_*", nn.BatchNorm)) == [
        "BatchNorm_0:input", "BatchNorm_0:output", "relu_0:input", "relu_0:output"
    ]  # fmt: skip
    assert seen(lambda path, kind: kind == "relu") == ["relu_0:input", "relu_0:output"]
    with pytest.raises(ValueError, match=r"Dense_0, BatchNorm_0, Dense_1, relu_0"):
        seen("Conv_*")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"every": 0}, ValueError, "every=0"),
        ({"capacity": 1.5}, ValueError, "capacity=1.5"),
        ({"elements": 0}, ValueError, "elements=0"),
        ({"layers": 3}, TypeError, "got 3"),
    ],
)
def test_refused(options, error, says):
    with pytest.raises(error, match=says):
        Monitor(**options)
