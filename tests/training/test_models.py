"""The mode of a model, the variables that a step carries, and the first state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense, Linear
from flax import linen as nn
from flax import nnx

from jaxnorm.training import (
    NonFiniteLossError,
    check_finite,
    create_train_state,
    make_eval_step,
    make_train_step,
)

X = np.random.default_rng(0).normal(3.0, 2.0, (5, 3)).astype(np.float32)
SGD = optax.sgd(0.1)


def square(y, batch):
    return (y**2).mean()


def outputs(y, batch):
    return {"y": y}


def with_argument(name, in_training):
    """A Linen model whose call has an argument of this name for the mode."""
    scope: dict[str, Any] = {"nn": nn}
    average = f"not {name}" if in_training else name
    exec(
        "class Net(nn.Module):\n"
        "    @nn.compact\n"
        f"    def __call__(self, x, *, {name}):\n"
        f"        return nn.BatchNorm(use_running_average={average}, name='norm')(x)\n",
        scope,
    )
    return scope["Net"]()


class ByField(nn.Module):
    training: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=not self.training, name="norm")(x)


class ByPosition(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class NNXByArgument(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(3, use_running_average=None, rngs=rngs)

    def __call__(self, x, train=False):
        return self.norm(x, use_running_average=not train)


class NNXByView(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.frozen = nnx.BatchNorm(3, rngs=rngs), True

    def set_view(self, use_running_average=None):
        if use_running_average is not None:
            self.frozen = use_running_average

    def __call__(self, x):
        return self.norm(x, use_running_average=self.frozen)


class NNXByAttribute(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.use_running_average = nnx.BatchNorm(3, rngs=rngs), None

    def __call__(self, x):
        return self.norm(x, use_running_average=self.use_running_average)


MODES = {
    "train": with_argument("train", True),
    "training": with_argument("training", True),
    "is_training": with_argument("is_training", True),
    "deterministic": with_argument("deterministic", False),
    "use_running_average": with_argument("use_running_average", False),
    "field": ByField(),
    "static position": nn.remat(ByPosition, static_argnums=(2,))(),
    "nnx argument": NNXByArgument(nnx.Rngs(0)),
    "nnx attribute": NNXByAttribute(nnx.Rngs(0)),
    "nnx view": NNXByView(nnx.Rngs(0)),
}


def stats(state):
    tree = state.batch_stats
    return (nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree)["norm"]


@pytest.mark.sample
@pytest.mark.parametrize("name", MODES)
def test_mode_is_found(name):
    model = MODES[name]
    state = create_train_state(model, SGD, 0, X)
    state, _ = make_train_step(model, SGD, square)(state, X)
    np.testing.assert_allclose(stats(state)["mean"], 0.01 * X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats(state)["var"], 0.99 + 0.01 * X.var(0), rtol=1e-5)
    y = make_eval_step(model, outputs)(state, X)["y"]
    scaled = (X - 0.01 * X.mean(0)) / np.sqrt(0.99 + 0.01 * X.var(0) + 1e-5)
    params = state.params["norm"]
    np.testing.assert_allclose(y, scaled * params["scale"] + params["bias"], rtol=1e-4, atol=1e-5)


def test_mode_can_be_named():
    model = with_argument("phase_is_train", True)
    state = create_train_state(model, SGD, 0, X, phase_is_train=True)
    step = make_train_step(model, SGD, square, train_kwargs={"phase_is_train": True})
    state, _ = step(state, X)
    np.testing.assert_allclose(stats(state)["mean"], 0.01 * X.mean(0), rtol=1e-5)
    make_eval_step(model, outputs, eval_kwargs={"phase_is_train": False})(state, X)
    writing = make_eval_step(model, outputs, eval_kwargs={"phase_is_train": True})
    with pytest.raises(ValueError, match="an evaluation must not write variables; Net tried"):
        writing(state, X)


def test_inputs_are_taken_from_the_batch():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, mask, train):
            return nn.BatchNorm(not train, name="norm")(x, mask=mask[:, None])

    mask = np.array([True, True, False, True, False])
    batch = {"image": X, "valid": mask}
    for inputs in (
        lambda b: (b["image"], b["valid"]),
        lambda b: {"mask": b["valid"], "x": b["image"]},
    ):
        state = create_train_state(Net(), SGD, 0, X, mask)
        state, _ = make_train_step(Net(), SGD, square, inputs=inputs)(state, batch)
        np.testing.assert_allclose(stats(state)["mean"], 0.01 * X[mask].mean(0), rtol=1e-5)
    state = create_train_state(Dense(3), SGD, 0, X)
    results = [
        make_eval_step(Dense(3), outputs, inputs=inputs)(state, batch)["y"]
        for batch, inputs in (
            ({"x": X, "y": 0}, None),
            ((X, 0), None),
            (X, None),
            ({"z": X}, lambda b: b["z"]),
        )
    ]
    assert all((result == results[0]).all() for result in results)


class Counter(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        seen = self.variable("counts", "seen", lambda: jnp.zeros((), jnp.int32))
        if train and not self.is_initializing():
            seen.value += x.shape[0]
        x = Dense(2)(x)
        self.sow("intermediates", "hidden", x)
        return x


class Seen(nnx.Variable):
    pass


class NNXCounter(nnx.Module):
    def __init__(self, rngs):
        self.seen, self.dense = Seen(jnp.zeros((), jnp.int32)), Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        self.seen[...] += x.shape[0]
        x = self.dense(x)
        self.hidden = nnx.Intermediate(x)
        return x


@pytest.mark.parametrize("model", [Counter(), NNXCounter(nnx.Rngs(0))], ids=["linen", "nnx"])
def test_other_state_is_carried_and_intermediates_are_not(model, counting, compilations):
    state, loss = create_train_state(model, SGD, 0, X), counting(square)
    step = make_train_step(model, SGD, loss)
    for _ in range(2):
        compilations.clear()
        state, _ = step(state, X)
    assert not compilations
    make_eval_step(model, outputs)(state, X)
    assert [int(leaf) for leaf in jax.tree.leaves(state.model_state)] == [10]
    assert not jax.tree.leaves(state.batch_stats)
    assert loss.calls == 1


def test_parameters_are_those_of_plain_flax(kind, batches, snapshot):
    x = batches(1)[0]["x"]
    optimizer = optax.identity()
    seeds = [5, jax.random.key(5), jax.random.key_data(jax.random.key(5)), np.int64(5)]
    states = [create_train_state(kind.make_seeded(), optimizer, seed, x) for seed in seeds]
    if kind.name == "linen":
        init = jax.jit(kind.make_seeded().init, static_argnums=2)
        expected = init(jax.random.key(5), x, True)["params"]
    else:
        expected = nnx.state(kind.make_seeded()(nnx.Rngs(5)), nnx.Param)
    for state in states:
        got = kind.values(state.params)
        jax.tree.map(np.testing.assert_array_equal, got, kind.values(expected))
        assert snapshot(state).keys() == snapshot(states[0]).keys()
        np.testing.assert_array_equal(snapshot(state)[".rng"], snapshot(states[0])[".rng"])


@pytest.mark.sample
def test_an_nnx_instance_gives_its_values_and_takes_them_back(mse, batches):
    (batch,) = batches(1, size=5)
    model = NNXByArgument(nnx.Rngs(0))
    model.norm.bias[...] = jnp.full(3, 2.0)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    state = create_train_state(model, SGD, 0)
    np.testing.assert_array_equal(state.params["norm"]["bias"][...], [2, 2, 2])
    state, _ = make_train_step(model, SGD, square)(state, batch)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    nnx.update(model, state.params, state.batch_stats, state.model_state)
    np.testing.assert_array_equal(model.norm.mean[...], stats(state)["mean"])


def test_shapes_stand_for_inputs():
    shape = jax.ShapeDtypeStruct((1, 3), jnp.float32)
    got = create_train_state(nn.Dense(2), SGD, 0, shape).params
    jax.tree.map(
        np.testing.assert_array_equal, got, create_train_state(nn.Dense(2), SGD, 0, X).params
    )


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_nonfinite_loss_is_reported(kind, mse, batches, snapshot, skip):
    data = batches(6)
    data[3]["y"] = data[3]["y"].at[0].set(np.nan)
    data[4]["x"] = data[4]["x"].at[0].set(np.inf)
    model = kind.make()
    state = create_train_state(model, optax.adam(0.1), 0, data[0]["x"])
    step = make_train_step(model, optax.adam(0.1), mse, skip_nonfinite=skip)
    losses = []
    for i, batch in enumerate(data):
        if i == 3:
            check_finite(state)
            before = snapshot(state)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        if i == 4 and skip:
            after = snapshot(state)
            changed = {path for path in before if not np.array_equal(before[path], after[path])}
            assert changed == {".step", ".nonfinite_step"}
    assert np.isfinite(losses).tolist() == [True, True, True, False, False, skip]
    assert int(state.step) == 6
    with pytest.raises(NonFiniteLossError, match=r"that of step 3 \(of 6 made\)") as caught:
        check_finite(state)
    assert caught.value.step == 3 and caught.value.steps == {0: 3}
