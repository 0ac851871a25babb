"""Moments of each channel, against NumPy on the values themselves."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxnorm.monitor import Monitor, Recording, attach, observe
from jaxnorm.training import (
    Layout,
    create_sweep_state,
    create_train_state,
    make_sweep_step,
    make_train_step,
    sweep_member,
)

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(2.0, 3.0, (16, 4, 4, 3)), jnp.float32)
MONITOR = Monitor(every=2, channels=True, elements=None)
NEAR = {"rtol": 1e-4, "atol": 1e-5}


class Net(nn.Module):
    """Channels first for a batch norm, last elsewhere; more of them from place to place."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(not train, axis=1)(x)
        x = nn.tanh(nn.Conv(5, (3, 3))(x))
        return nn.LayerNorm()(nn.Dense(2)(x.mean((1, 2))))


AXES = {"BatchNorm_0": 1, "tanh_0": -1, "LayerNorm_0": -1}


def values(variables, x):
    """What is at each place, by hand."""
    p = variables["params"]
    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, bias = (p["BatchNorm_0"][name].reshape(-1, 1, 1) for name in ("scale", "bias"))
    y = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    z = nn.Conv(5, (3, 3)).apply({"params": p["Conv_0"]}, y)
    d = np.tanh(z).mean((1, 2)) @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"]
    n = nn.LayerNorm().apply({"params": p["LayerNorm_0"]}, d)
    names = [f"{layer}:{side}" for layer in AXES for side in ("input", "output")]
    return dict(zip(names, (x, y, z, np.tanh(z), d, n)))


def assert_sees(channels, name, value, at=()):
    value = np.moveaxis(np.asarray(value, np.float64), AXES[name.split(":")[0]], -1)
    value = value.reshape(-1, value.shape[-1])
    np.testing.assert_allclose(channels.mean[at], value.mean(0), **NEAR, err_msg=name)
    np.testing.assert_allclose(channels.var[at], value.var(0), **NEAR, err_msg=name)
    assert (np.asarray(channels.count[at]) == len(value)).all()


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), X)


def apply(variables, x):
    return attach(Net()).apply(variables, x, mutable=["batch_stats"])[0]


def test_every_place_shows_its_channels(variables):
    _, seen = jax.jit(observe(apply, channels=True))(variables, X)
    expected = values(variables, X)
    assert set(seen) == set(expected)
    for name, value in expected.items():
        assert_sees(seen[name].channels, name, value)
    _, plain = jax.jit(observe(apply))(variables, X)
    assert all(plain[name].channels is None for name in plain)


def test_all_channels_are_looked_at_however_few_elements_are(variables):
    _, seen = jax.jit(observe(apply, channels=True, elements=64))(variables, X)
    value = seen["tanh_0:input"]
    assert value.channels.mean.shape == (5,)
    assert (value.channels.count == 16 * 4 * 4).all()


def test_under_vmap(variables):
    both = jnp.stack([X, 2 * X + 1])
    _, seen = jax.jit(jax.vmap(observe(apply, channels=True), (None, 0)))(variables, both)
    for i in range(2):
        for name, value in values(variables, both[i]).items():
            assert_sees(seen[name].channels, name, value, at=i)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.LayerNorm()(x), None


def test_in_a_loop_over_layers_that_are_computed_again():
    scan = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x = X[:, 0, 0]
    variables = scan().init(jax.random.key(0), x, None)

    def run(x):
        return attach(scan()).apply(variables, x, None)[0].sum()

    _, seen = jax.jit(observe(jax.grad(run), channels=True))(x)
    for i in range(3):
        name = next(name for name in seen if f"[{i}]:input" in name)
        np.testing.assert_allclose(seen[name].channels.mean, x.mean(0), **NEAR)
        np.testing.assert_allclose(seen[name].channels.var, x.var(0), **NEAR)
        inner = jax.tree.map(lambda a, i=i: a[i], variables)
        x = Block().apply(inner, x)[0]


def loss(y, _):
    return (y**2).mean()


def run(steps, **options):
    optimizer = optax.sgd(0.1)
    states = [create_train_state(Net(), optimizer, 0, X, layout=options.get("layout"))]
    step = make_train_step(Net(), optimizer, loss, monitor=MONITOR, donate=False, **options)
    for _ in range(steps):
        states.append(step(states[-1], X)[0])
    return states


def test_a_recording_has_a_row_of_channels_for_each_sample(tmp_path):
    states = run(3)
    Recording(tmp_path).append(states[-1])
    recording = Recording(tmp_path)
    for at, step in enumerate((0, 2)):
        for name, value in values({"params": states[step].params}, X).items():
            assert_sees(recording[name].channels, name, value, at=at)
    assert recording["tanh_0:input"].channels.mean.shape == (2, 5)


def test_on_a_mesh_in_micro_batches_and_in_a_sweep(tmp_path):
    def recorded(state, name):
        recording = Recording(tmp_path / name)
        recording.append(state)
        return {name: recording[name].channels for name in recording}

    state = create_sweep_state(Net(), optax.sgd, [0, 0], {"learning_rate": [0.5, 0.1]}, X)
    step = make_sweep_step(Net(), optax.sgd, loss, monitor=MONITOR)
    for _ in range(3):
        state, _ = step(state, X)
    alone = recorded(run(3)[-1], "alone")
    halves = recorded(run(1, accumulate=2)[-1], "halves")["BatchNorm_0:input"]
    np.testing.assert_allclose(halves.mean[0], alone["BatchNorm_0:input"].mean[0], **NEAR)
    np.testing.assert_allclose(halves.count, alone["BatchNorm_0:input"].count[:1])
    spread = recorded(run(3, layout=Layout.data_parallel())[-1], "spread")
    for others in (spread, recorded(sweep_member(state, 1), "swept")):
        for name, channels in alone.items():
            for a, b in zip(channels, others[name]):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
