"""Steps with and without a sample, chosen on the host from a count that needs no device."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from jaxnorm.monitor import Monitor
from jaxnorm.training import (
    create_sweep_state,
    create_train_state,
    make_sweep_step,
    make_train_step,
)

MODEL, OPTIMIZER = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(1)]), optax.sgd(0.1)
X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def loss(y, batch):
    return (y**2).mean()


def step_of(monitor, **options):
    return make_train_step(MODEL, OPTIMIZER, loss, monitor=monitor, **options)


def start(seed=0):
    return create_train_state(MODEL, OPTIMIZER, seed, X)


@pytest.fixture(scope="module")
def begun():
    """A state, and a step that may start from it any number of times."""
    return start(), step_of(Monitor(every=2), donate=False)


def sampled(state):
    return state.monitor.read()[0].tolist()


def test_a_step_without_a_sample_is_the_program_of_a_run_without_a_monitor():
    state, step = jax.eval_shape(start), step_of(Monitor(every=3))
    unmonitored = step.compiled.unmonitored.lower(state, X).as_text()
    assert unmonitored == step_of(None).lower(state, X).as_text()
    with_buffer, _ = jax.eval_shape(step, state, X)
    assert len(step.compiled.sampling.lower(with_buffer, X).as_text()) > 2 * len(unmonitored)


def test_all_is_compiled_before_the_first_step(compilations):
    step = step_of(Monitor(every=3))
    state = start()
    compilations.clear()
    state, _ = step(state, X)
    assert compilations
    compilations.clear()
    for _ in range(6):
        state, _ = step(state, X)
    assert not compilations and sampled(state) == [0, 3, 6]


def test_the_device_is_asked_only_for_a_state_from_elsewhere(monkeypatch):
    asked = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: asked.append(x) or get(x))
    step, states = step_of(Monitor(every=2)), [start(0), start(1)]
    for _ in range(5):  # two runs, step by step
        states = [step(state, X)[0] for state in states]
    assert len(asked) == 2
    # A state that this step has not returned, at another count.
    states[0] = states[0].replace(step=jax.device_put(np.int32(11)))
    for _ in range(3):
        states[0], _ = step(states[0], X)
    assert len(asked) == 3
    monkeypatch.undo()
    assert sampled(states[0]) == [0, 2, 4, 12] and sampled(states[1]) == [0, 2, 4]


def test_a_step_that_is_repeated_is_sampled_again(begun):
    state, step = begun
    first, _ = step(state, X)
    second, _ = step(first, X)
    for _ in range(2):
        third, _ = step(second, X)
        assert sampled(third) == [0, 2]
    again, _ = step(first, X)
    assert sampled(again) == [0] and int(again.step) == 2


@pytest.mark.parametrize("larger", [jax.jit, lambda f: lambda s, b: jax.lax.scan(f, s, b[None])])
def test_in_a_larger_program_the_device_chooses(begun, larger):
    state, step = begun
    state, _ = step(state, X)
    run = larger(step)
    for _ in range(4):
        state, _ = run(state, X)
    assert sampled(state) == [0, 2, 4]
    rows = state.monitor.read()[1]
    state = begun[0]
    for _ in range(5):
        state, _ = step(state, X)
    np.testing.assert_allclose(rows, state.monitor.read()[1], rtol=1e-4, atol=1e-6)


def test_a_sweep_counts_too():
    rates = {"learning_rate": [0.0, 0.1]}
    state = create_sweep_state(MODEL, optax.sgd, [0, 1], rates, X)
    step = make_sweep_step(MODEL, optax.sgd, loss, monitor=Monitor(every=2))
    for _ in range(4):
        state, _ = step(state, X)
    assert state.monitor.written.tolist() == [2, 2]
    assert state.monitor.steps[:, :2].tolist() == [[0, 2], [0, 2]]
