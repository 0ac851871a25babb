"""What each channel shows, against NumPy on the values themselves."""

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
    assert (np.asarray(channels.moments.count[at]) == len(value)).all()
    assert (np.asarray(channels.size[at]) == len(value)).all()
    expected = {
        "mean": (channels.moments.mean, value.mean(0)),
        "var": (channels.moments.var, value.var(0)),
        "minimum": (channels.minimum, value.min(0)),
        "maximum": (channels.maximum, value.max(0)),
        "nonfinite": (channels.nonfinite, np.zeros(value.shape[-1])),
        "zeros": (channels.zeros, (value == 0).mean(0)),
        "norm": (channels.norm, np.linalg.norm(value, axis=0)),
    }
    if name == "tanh_0:output":
        expected["saturated"] = channels.saturated, (1 - value**2 < 0.05).mean(0)
    for what, (seen, is_) in expected.items():
        np.testing.assert_allclose(seen[at], is_, **NEAR, err_msg=f"{name} {what}")


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


def test_gradients_show_their_channels_too(variables):
    """Against derivatives by what is added at a place, where nothing else is in between."""
    cotangent = jnp.asarray(RNG.normal(size=(16, 2)), jnp.float32)

    def training(x):
        return (apply(variables, x) * cotangent).sum()

    slope, seen = jax.jit(observe(jax.grad(training), channels=True))(X)
    expected = {"BatchNorm_0:input": slope, "LayerNorm_0:output": cotangent}
    for name, gradient in expected.items():
        axis = AXES[name.split(":")[0]]
        gradient = np.moveaxis(np.asarray(gradient, np.float64), axis, -1)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        channels = seen[name].channel_gradients
        np.testing.assert_allclose(channels.norm, np.linalg.norm(gradient, axis=0), rtol=1e-4)
        np.testing.assert_allclose(channels.minimum, gradient.min(0), **NEAR)
        np.testing.assert_allclose(channels.moments.mean, gradient.mean(0), **NEAR)
    for name in seen:
        of_channels = np.linalg.norm(seen[name].channel_gradients.norm)
        np.testing.assert_allclose(of_channels, seen[name].gradient.norm, rtol=1e-3)


def test_all_channels_are_looked_at_however_few_elements_are(variables):
    _, seen = jax.jit(observe(apply, channels=True, elements=64))(variables, X)
    channels = seen["tanh_0:input"].channels
    assert channels.moments.mean.shape == (5,)
    assert (channels.moments.count == 16 * 4 * 4).all() and (channels.size == 16 * 4 * 4).all()


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
        np.testing.assert_allclose(seen[name].channels.moments.mean, x.mean(0), **NEAR)
        np.testing.assert_allclose(seen[name].channels.moments.var, x.var(0), **NEAR)
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
    assert recording["tanh_0:input"].channels.moments.mean.shape == (2, 5)


@pytest.mark.seconds(90, "three ways to train, watched")
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
    whole = jax.tree.map(lambda a: a[:1], alone["BatchNorm_0:input"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **NEAR), halves, whole)
    spread = recorded(run(3, layout=Layout.data_parallel())[-1], "spread")
    for others in (spread, recorded(sweep_member(state, 1), "swept")):
        for name, channels in alone.items():
            for a, b in zip(jax.tree.leaves(channels), jax.tree.leaves(others[name]), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)
