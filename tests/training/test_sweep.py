"""A member of a sweep computes the numbers of the same single run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense

from jaxnorm.training import (
    NonFiniteLossError,
    check_finite,
    create_sweep_state,
    create_train_state,
    grid,
    make_eval_step,
    make_sweep_eval_step,
    make_sweep_step,
    make_train_step,
    sweep_member,
)

STEPS = 3
SEEDS, RATES = grid([3, 4], learning_rate=[0.02, 0.1])


def adam(learning_rate):
    # The gradient of a bias before a batch norm is rounding, which a small eps would magnify.
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate, eps=1e-3))


def stack(batches):
    return jax.tree.map(lambda *x: jnp.stack(x), *batches)


@functools.lru_cache
def single_runs(kind, mse, batches, x64):
    """Each member as a single run: states and losses of shape (members, steps)."""
    states, losses = [], []
    model, data = kind.make_seeded(dropout=0.2), batches(STEPS)
    steps = {
        rate: make_train_step(model, adam(rate), mse, donate=False)
        for rate in set(RATES["learning_rate"])
    }
    starts = {s: create_train_state(model, adam(0.0), s, data[0]["x"]) for s in set(SEEDS)}
    for seed, rate in zip(SEEDS, RATES["learning_rate"]):
        state, step, run = starts[seed], steps[rate], []
        for batch in data:
            state, metrics = step(state, batch)
            run.append(float(metrics["loss"]))
        states.append(state)
        losses.append(run)
    return states, np.array(losses)


def assert_member(snapshot, swept, single):
    """Compare all but the optimizer state, which also holds the hyperparameters."""
    for name in ("step", "params", "batch_stats", "model_state", "rng", "nonfinite_step"):
        a, b = snapshot(getattr(swept, name)), snapshot(getattr(single, name))
        assert a.keys() == b.keys()
        for path in a:
            np.testing.assert_allclose(a[path], b[path], rtol=1e-4, atol=3e-5, err_msg=path)


@pytest.mark.sample
@pytest.mark.parametrize(
    "kind, x64", [("linen", False), ("linen", True), ("nnx", False)], indirect=True
)
def test_members_are_single_runs(kind, x64, mse, batches, counting, snapshot, compilations):
    data = batches(STEPS)
    singles, losses = single_runs(kind, mse, batches, x64)
    model, loss = kind.make_seeded(dropout=0.2), counting(mse)
    start = create_sweep_state(model, adam, SEEDS, RATES, data[0]["x"])
    step = make_sweep_step(model, adam, loss)
    state, got = start, []
    for batch in data:
        compilations.clear()
        state, metrics = step(state, batch)
        got.append(metrics["loss"])
    assert loss.calls == 1 and not compilations
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start))
    np.testing.assert_allclose(np.array(got).T, losses, rtol=1e-4)
    for i, single in enumerate(singles):
        assert_member(snapshot, sweep_member(state, i), single)
    # The rates are rounded like the Python number of a single run.
    assert state.opt_state.hyperparams["learning_rate"].dtype == jnp.float32
    # Seeds and rates both matter: four different runs.
    assert len({float(x) for x in losses[:, -1]}) == 4
    evaluate = make_sweep_eval_step(model, lambda y, b: {"loss": mse(y, b)})
    before = snapshot(state)
    together = evaluate(state, data[0])["loss"]
    one = make_eval_step(model, lambda y, b: {"loss": mse(y, b)})
    np.testing.assert_allclose(together, [one(s, data[0])["loss"] for s in singles], rtol=1e-4)
    after = snapshot(state)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_scan_of_a_sweep(kind, mse, batches, counting, snapshot):
    data = batches(STEPS)
    singles, losses = single_runs(kind, mse, batches, False)
    model, loss = kind.make_seeded(dropout=0.2), counting(mse)
    step = make_sweep_step(model, adam, loss, scan=True)
    state = create_sweep_state(model, adam, SEEDS, RATES, data[0]["x"])
    state, metrics = step(state, stack(data))
    assert loss.calls == 1
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-4)
    for i, single in enumerate(singles):
        assert_member(snapshot, sweep_member(state, i), single)


@pytest.mark.parametrize("scan", [False, True])
def test_a_batch_for_each_member(mse, batches, scan):
    data = batches(3)
    state = create_sweep_state(
        Dense(1), optax.sgd, [0, 0, 0], {"learning_rate": [0.1] * 3}, data[0]["x"]
    )
    kernel = np.asarray(state.params["kernel"][0])
    own = stack(data)
    batch = jax.tree.map(lambda x: x[:, None], own) if scan else own
    step = make_sweep_step(Dense(1), optax.sgd, mse, batch_per_member=True, scan=scan)
    state, metrics = step(state, batch)
    assert metrics["loss"].shape == ((3, 1) if scan else (3,))
    for i, one in enumerate(data):
        x, y = np.asarray(one["x"]), np.asarray(one["y"])
        expected = kernel - 0.1 * 2 * x.T @ (x @ kernel - y) / y.size
        np.testing.assert_allclose(state.params["kernel"][i], expected, atol=1e-5)
    evaluate = make_sweep_eval_step(
        Dense(1), lambda y, b: {"y": y, "own": b["y"].sum()}, batch_per_member=True
    )
    np.testing.assert_allclose(
        evaluate(state, own)["own"], [np.asarray(b["y"]).sum() for b in data], rtol=1e-5
    )


def test_two_hyperparameters_by_hand(mse, batches):
    data = batches(2)
    seeds, values = grid([1], learning_rate=[0.1, 0.2], momentum=[0.0, 0.9])

    def make(learning_rate, momentum):
        return optax.sgd(learning_rate, momentum=momentum)

    state = create_sweep_state(Dense(1, use_bias=False), make, seeds, values, data[0]["x"])
    step = make_sweep_step(Dense(1, use_bias=False), make, mse)
    kernels = np.array(state.params["kernel"], np.float64)
    velocity = np.zeros_like(kernels)
    rates = np.array(values["learning_rate"])[:, None, None]
    momenta = np.array(values["momentum"])[:, None, None]
    for batch in data:
        state, _ = step(state, batch)
        x, y = np.asarray(batch["x"]), np.asarray(batch["y"])
        gradients = 2 * np.einsum("nf,mno->mfo", x, x @ kernels - y) / y.size
        velocity = gradients + momenta * velocity
        kernels = kernels - rates * velocity
    np.testing.assert_allclose(state.params["kernel"], kernels, atol=1e-5)
    swept = state.opt_state.hyperparams
    np.testing.assert_allclose(swept["momentum"], values["momentum"], rtol=1e-6)


def test_members_that_diverge_are_named_and_alone(mse, batches):
    data = batches(40)
    rates = {"learning_rate": [0.01, 1e30, 0.01, 30.0]}
    state = create_sweep_state(Dense(1), optax.sgd, [0] * 4, rates, data[0]["x"])
    step = make_sweep_step(Dense(1), optax.sgd, mse, scan=True)
    state, metrics = step(state, stack(data))
    bad = ~np.isfinite(np.asarray(metrics["loss"]))
    first = {i: int(np.argmax(bad[i])) for i in range(4) if bad[i].any()}
    assert sorted(first) == [1, 3] and first[1] < first[3]
    with pytest.raises(NonFiniteLossError, match=r"2 of 4 members .* member 1 at step") as caught:
        check_finite(state)
    assert caught.value.steps == first and caught.value.step == first[1]
    np.testing.assert_array_equal(state.params["kernel"][0], state.params["kernel"][2])
    assert np.isfinite(np.asarray(state.params["kernel"][0])).all()


def test_grid_has_every_combination():
    seeds, values = grid([1, 2], a=[10, 20], b=[5])
    assert seeds == [1, 2, 1, 2]
    assert values == {"a": [10, 10, 20, 20], "b": [5, 5, 5, 5]}
    assert grid([1, 2]) == ([1, 2], {})
