"""A step against the same training written by hand, and the other promises of a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense
from flax import linen as nn
from flax import nnx

from jaxnorm.training import create_train_state, make_eval_step, make_train_step

MOMENTUM = 0.9


def assert_same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.mark.sample
def test_step_is_the_hand_written_loop(kind, plain, mse, batches):
    data = batches(5)
    model = kind.make()
    state = create_train_state(model, optax.sgd(0.1, momentum=0.5), 0, data[0]["x"])
    step = make_train_step(model, optax.sgd(0.1, momentum=0.5), mse)
    params, mean, var = kind.plain(state)
    velocity = jax.tree.map(np.zeros_like, params)

    @jax.jit
    def loss_and_grad(params, mean, var, batch):
        def loss(params):
            y, *stats = plain(params, mean, var, batch["x"], True)
            return mse(y, batch), stats

        return jax.value_and_grad(loss, has_aux=True)(params)

    for batch in data:
        (loss, (mean, var)), grad = loss_and_grad(params, mean, var, batch)
        velocity = jax.tree.map(lambda v, g: np.asarray(g) + 0.5 * v, velocity, grad)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    got_params, got_mean, got_var = kind.plain(state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), got_params, params)
    np.testing.assert_allclose(got_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(got_var, var, rtol=1e-5)
    assert int(state.step) == 5 and int(state.nonfinite_step) == -1


def test_evaluation_uses_running_statistics_and_writes_nothing(kind, plain, mse, batches, snapshot):
    data = batches(3)
    model = kind.make(dropout=0.5)
    state = create_train_state(model, optax.sgd(0.1), 0, data[0]["x"])
    step = make_train_step(model, optax.sgd(0.1), mse)
    for batch in data:
        state, _ = step(state, batch)
    before = snapshot(state)
    loss = make_eval_step(model, lambda y, b: {"loss": mse(y, b), "y": y})
    first, second = loss(state, data[0]), loss(state, data[0])
    assert_same(before, snapshot(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    params, mean, var = kind.plain(state)
    outputs, _, _ = jax.jit(plain, static_argnums=4)(params, mean, var, data[0]["x"], False)
    np.testing.assert_allclose(first["y"], outputs, atol=2e-6)
    np.testing.assert_array_equal(first["y"], second["y"])


@pytest.mark.parametrize(
    "kind, x64", [("linen", False), ("linen", True), ("nnx", True)], indirect=True
)
def test_a_hundred_steps_trace_once(kind, x64, mse, batches, counting):
    schedule = optax.cosine_decay_schedule(0.01, 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    data = batches(2)
    model, loss = kind.make(dropout=0.1), counting(mse)
    state = create_train_state(model, optimizer, 0, data[0]["x"])
    kinds = jax.tree.map(jax.typeof, state)
    step = make_train_step(model, optimizer, loss)
    metrics_fn = counting(lambda y, b: {"loss": mse(y, b)})
    evaluate = make_eval_step(model, metrics_fn)
    for i in range(100):
        state, _ = step(state, data[i % 2])
        evaluate(state, data[i % 2])
    assert (loss.calls, metrics_fn.calls) == (1, 1)
    assert jax.tree.map(jax.typeof, state) == kinds
    assert int(state.step) == 100
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.batch_stats))


@pytest.mark.sample
def test_state_is_donated_and_nothing_else(kind, mse, batches):
    (batch,) = batches(1)
    model, key = kind.make(), jax.random.key(3)

    # An optimizer that keeps the parameters twice: no buffer may be donated twice.
    def halve(grads, kept, params):
        new = jax.tree.map(lambda a, b: (a + b) / 2, *kept)
        return grads, (new, new)

    keeps = optax.GradientTransformation(lambda p: (p, p), halve)
    optimizer = optax.chain(keeps, optax.sgd(0.1))
    state = create_train_state(model, optimizer, key, batch["x"])
    new, _ = make_train_step(model, optimizer, mse)(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    theirs = jax.tree.leaves([key, batch] + ([nnx.state(model)] if kind.name == "nnx" else []))
    assert not any(leaf.is_deleted() for leaf in theirs)
    make_train_step(model, optimizer, mse, donate=False)(new, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_retry_counts_a_batch_once_and_resume_continues(kind, mse, batches, snapshot):
    data = batches(2)
    model = kind.make(dropout=0.5)
    state = create_train_state(model, optax.sgd(0.1), 0, data[0]["x"])
    step = make_train_step(model, optax.sgd(0.1), mse, donate=False)
    once, first = step(state, data[0])
    again, second = step(state, data[0])
    assert_same(snapshot(once), snapshot(again))
    assert first["loss"] == second["loss"]
    resumed = jax.tree.map(jnp.array, once)
    assert_same(snapshot(step(once, data[1])), snapshot(step(resumed, data[1])))


def test_dropout_draws_anew_for_each_step_and_seed(kind, mse, batches):
    (batch,) = batches(1)
    model = kind.make(dropout=0.5)
    step = make_train_step(model, optax.sgd(0.0), mse)
    losses = []
    for seed in (0, 0, 1):
        # The same parameters for both seeds.
        state = create_train_state(kind.make(dropout=0.5), optax.sgd(0.0), seed, batch["x"])
        run = []
        for _ in range(4):
            state, metrics = step(state, batch)
            run.append(float(metrics["loss"]))
        losses.append(run)
    assert losses[0] == losses[1]
    assert len(set(losses[0] + losses[2])) == 8


# Much less to compile than L-BFGS, which is among OPTIMIZERS.
SEARCH = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(4))


@pytest.mark.parametrize(
    "remat, optimizer",
    [(False, optax.sgd(0.1)), (True, optax.sgd(0.1)), (False, SEARCH)],
    ids=["plain", "remat", "line search"],
)
def test_a_batch_counts_once(kind, mse, batches, remat, optimizer):
    # Rematerialization runs the layer twice, a line search the whole model several times.
    (batch,) = batches(1)
    model = kind.make(remat=remat)
    state = create_train_state(model, optimizer, 0, batch["x"])
    params, _, _ = kind.plain(state)
    hidden = np.asarray(batch["x"], np.float64) @ params["first"]["kernel"]
    state, _ = make_train_step(model, optimizer, mse)(state, batch)
    _, mean, var = kind.plain(state)
    np.testing.assert_allclose(mean, (1 - MOMENTUM) * hidden.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, MOMENTUM + (1 - MOMENTUM) * hidden.var(0), rtol=1e-5)


@pytest.mark.sample
def test_scan_is_the_steps_in_one_program(kind, mse, batches, counting, snapshot):
    data = batches(7)
    model = kind.make(dropout=0.3)

    def fresh():
        return create_train_state(model, optax.adam(0.05, eps=1e-3), 0, data[0]["x"])

    step = make_train_step(model, optax.adam(0.05, eps=1e-3), mse)
    one, losses = fresh(), []
    for batch in data:
        one, metrics = step(one, batch)
        losses.append(metrics["loss"])
    loss = counting(mse)
    loop = make_train_step(model, optax.adam(0.05, eps=1e-3), loss, scan=True)
    state = fresh()
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *data)
    many, metrics = loop(state, stacked)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(metrics["loss"], np.array(losses), rtol=1e-4)
    assert int(many.step) == 7
    a, b = snapshot(one), snapshot(many)
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-4, err_msg=path)
    loop(many, stacked)
    assert loss.calls == 1


OPTIMIZERS = {
    "adamw schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 1, 9)),
    "multi steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "lbfgs": optax.lbfgs(),
    "polyak": optax.polyak_sgd(0.1),
    "plateau": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()),
    "masked": optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "inject": optax.inject_hyperparams(optax.rmsprop)(optax.linear_schedule(0.1, 0.0, 9)),
    "apply if finite": optax.apply_if_finite(optax.lion(0.01), 3),
    # Its update takes no further arguments, although its type says that it does.
    "sharpness aware": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2),
}


@pytest.mark.parametrize("x64", [True], indirect=True)  # x64 shows wrong dtypes
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name, x64, mse, batches, compilations):
    data = batches(1)[0]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Dense(1)(jnp.tanh(Dense(3)(x)))

    optimizer = OPTIMIZERS[name]
    state = create_train_state(Net(), optimizer, 0, data["x"])
    start = float(mse(Net().apply({"params": state.params}, data["x"]), data))
    step = make_train_step(Net(), optimizer, mse)
    state, first = step(state, data)
    np.testing.assert_allclose(first["loss"], start, rtol=1e-5)
    compilations.clear()
    for _ in range(7):
        state, metrics = step(state, data)
    assert not compilations
    assert float(metrics["loss"]) < start


def test_weak_types_do_not_trace_again(x64, mse, batches, counting, compilations):
    (batch,) = batches(1)
    # A Python number in a state is a weakly typed array to JAX, and another signature.
    careless = optax.GradientTransformation(
        lambda p: (0.5, jnp.zeros(())), lambda g, s, p: (g, (jnp.asarray(0.5), s[0] * 2))
    )
    optimizer, loss = optax.chain(careless, optax.sgd(0.1)), counting(mse)
    for scan in (False, True):
        loss.calls = 0
        state = create_train_state(Dense(1), optimizer, 0, batch["x"])
        step = make_train_step(Dense(1), optimizer, loss, scan=scan)
        given = jax.tree.map(lambda x: x[None], batch) if scan else batch
        for _ in range(3):
            compilations.clear()
            state, _ = step(state, given)
        assert loss.calls == 1 and not compilations


def test_a_model_without_statistics_and_bfloat16_parameters(batches, mse):
    (batch,) = batches(1)
    model = Dense(1, param_dtype=jnp.bfloat16)
    state = create_train_state(model, optax.sgd(0.1), 0, batch["x"])
    assert state.batch_stats == {} and state.model_state == {}
    kernel = np.asarray(state.params["kernel"], np.float32)
    x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
    gradient = 2 * x.T @ (x @ kernel - y) / y.size
    state, _ = make_train_step(model, optax.sgd(0.1), mse)(state, batch)
    assert state.params["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(state.params["kernel"], np.float32), kernel - 0.1 * gradient, atol=0.01
    )
    assert make_eval_step(model, lambda y, b: {"y": y})(state, batch)["y"].shape == (6, 1)


def test_metrics_of_the_loss_are_returned(batches, mse, kind):
    (batch,) = batches(1)
    model = kind.make()
    state = create_train_state(model, optax.sgd(0.1), 0, batch["x"])
    step = make_train_step(
        model, optax.sgd(0.1), lambda y, b: (mse(y, b), {"largest": abs(y).max(), "y": y})
    )
    _, metrics = step(state, batch)
    assert sorted(metrics) == ["largest", "loss", "y"]
    np.testing.assert_allclose(metrics["largest"], abs(np.asarray(metrics["y"])).max())
    np.testing.assert_allclose(metrics["loss"], mse(metrics["y"], batch), rtol=1e-6)
