"""Internal covariate shift of a training step, against gradients taken one by one outside of it."""

import json

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from recordings import invent

from jaxnorm.monitor import Monitor, Recording
from jaxnorm.training import (
    Layout,
    create_sweep_state,
    create_train_state,
    make_sweep_step,
    make_train_step,
    sweep_member,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
Y = RNG.normal(size=(16, 2)).astype(np.float32)
BATCH = {"x": X, "y": Y}
RATE = 0.3
MONITOR = Monitor(every=1, shift=True)


class Net(nn.Module):
    """Named so that their alphabetical order is not that in which they are used."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(5, name="third")(x)
        x = nn.relu(nn.BatchNorm(not train, name="second")(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(2, name="first")(x)


class Same(nnx.Module):
    """The same net."""

    def __init__(self, rngs):
        self.third = nnx.Linear(3, 5, rngs=rngs)
        self.second = nnx.BatchNorm(5, rngs=rngs)
        self.first = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.first(nnx.relu(self.second(self.third(x))))


LAYERS = ("third", "second", "first")


def loss(y, batch):
    return ((y - batch["y"]) ** 2).mean()


def run(model, steps, *, monitor=MONITOR, rate=RATE, **options):
    """States before and after each step."""
    optimizer = optax.sgd(rate)
    states = [create_train_state(model, optimizer, 0, X, layout=options.get("layout"))]
    step = make_train_step(model, optimizer, loss, monitor=monitor, donate=False, **options)
    for _ in range(steps):
        states.append(step(states[-1], BATCH)[0])
    return states


@pytest.fixture(scope="module")
def linen():
    return run(Net(), 2)


def expected(gradient, old, new):
    """Definition 2.1, layer by layer: how far the gradient moves, and the angle's cosine."""
    here, found = gradient(old), []
    for i, name in enumerate(LAYERS):
        mixed = type(old)({k: (new if k in LAYERS[:i] else old)[k] for k in LAYERS})
        there = gradient(mixed)
        a, b = (
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(g[name])]).astype(np.float64)
            for g in (here, there)
        )
        found.append((np.linalg.norm(a - b), a @ b / np.linalg.norm(a) / np.linalg.norm(b)))
    return np.array(found).T


def assert_near(shift, at, wanted):
    assert shift.layers == LAYERS
    assert shift.l2[at, 0] == 0 and shift.cosine[at, 0] == 1
    assert (shift.l2[at, 1:] > 1e-3).all()
    np.testing.assert_allclose(shift.l2[at], wanted[0], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(shift.cosine[at], wanted[1], rtol=1e-4)


def recorded(state, folder):
    recording = Recording(folder)
    recording.append(state)
    return recording


@pytest.mark.sample
def test_of_a_linen_model(linen, tmp_path):
    plain = run(Net(), 2, monitor=None)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        linen[2].params, plain[2].params,
    )  # fmt: skip
    shift = recorded(linen[-1], tmp_path).shift
    assert shift.l2.shape == shift.cosine.shape == (2, 3)

    @jax.jit
    @jax.grad
    def gradient(params, stats):
        variables = {"params": params, "batch_stats": stats}
        return loss(Net().apply(variables, X, True, mutable=["batch_stats"])[0], BATCH)

    for at in range(2):
        stats, old, new = linen[at].batch_stats, linen[at].params, linen[at + 1].params
        assert_near(shift, at, expected(lambda p, s=stats: gradient(p, s), old, new))


@pytest.mark.sample
def test_of_an_nnx_model(tmp_path):
    states = run(Same, 2)
    shift = recorded(states[-1], tmp_path).shift
    graph, _, rest = nnx.split(nnx.jit(lambda: Same(nnx.Rngs(0)))(), nnx.Param, ...)

    @jax.jit
    def gradient(params, rest):
        model = nnx.merge(graph, params, rest)
        return nnx.grad(lambda model: loss(model(X), BATCH))(model)

    for at in range(2):
        old, new = states[at].params, states[at + 1].params
        assert_near(shift, at, expected(lambda p: gradient(p, rest), old, new))


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"remat": True}], ids=str)
def test_with_the_steps_own_random_numbers(tmp_path, options):
    model = Net(0.5)
    before, after = run(model, 1, **options)
    # A plain step at a rate of 1 takes the gradient away from the parameters.
    step = make_train_step(model, optax.sgd(1.0), loss, donate=False, **options)

    def gradient(params):
        new, _ = step(before.replace(params=params), BATCH)
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, new.params)

    wanted = expected(gradient, before.params, after.params)
    assert_near(recorded(after, tmp_path).shift, 0, wanted)


def test_on_a_mesh_and_in_a_sweep(linen, tmp_path):
    alone = recorded(linen[-1], tmp_path / "alone").shift
    spread = run(Net(), 2, layout=Layout.data_parallel())[-1]
    rates = {"learning_rate": [1.0, RATE]}
    state = create_sweep_state(Net(), optax.sgd, [0, 0], rates, X)
    step = make_sweep_step(Net(), optax.sgd, loss, monitor=MONITOR)
    for _ in range(2):
        state, _ = step(state, BATCH)
    for i, other in enumerate((spread, sweep_member(state, 1))):
        shift = recorded(other, tmp_path / str(i)).shift
        np.testing.assert_allclose(shift.l2, alone.l2, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(shift.cosine, alone.cosine, rtol=1e-3)


def test_what_is_recorded_is_read_again_and_told(linen, tmp_path):
    recording = recorded(linen[-1], tmp_path / "run")
    again = Recording(tmp_path / "run").shift
    assert again.layers == LAYERS
    np.testing.assert_array_equal(again.l2, recording.shift.l2)
    told = [numbers for _, numbers in recording.numbers()]
    np.testing.assert_allclose([n["shift/first/l2"] for n in told], again.l2[:, 2])
    np.testing.assert_allclose([n["shift/second/cosine"] for n in told], again.cosine[:, 1])


def test_a_recording_from_before_there_was_such_a_thing(tmp_path):
    invent(tmp_path)
    head = tmp_path / "recording.json"
    stored = json.loads(head.read_text())
    del stored["schema"]["shift_layers"]
    head.write_text(json.dumps(stored))
    recording = Recording(tmp_path)
    assert len(recording) == 12 and recording.shift is None
    assert not any("shift/" in name for _, numbers in recording.numbers() for name in numbers)
