"""What each channel shows, against NumPy on the values themselves."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from drawn import initial

from jaxnorm.monitor import Monitor, Recording, attach, observe
from jaxnorm.training import create_train_state, make_train_step

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, (16, 4, 4, 3)).astype(np.float32)
NEAR = {"rtol": 1e-4, "atol": 1e-5}


class Net(nn.Module):
    """Channels first for a batch norm, last elsewhere; more of them from place to place."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(not train, axis=1)(x)
        x = nn.tanh(nn.Dense(5)(x))
        return nn.LayerNorm()(nn.Dense(2)(x.mean((1, 2))))


AXES = {"BatchNorm_0": 1, "tanh_0": -1, "LayerNorm_0": -1}


def values(p, x):
    """What is at each place, by hand."""
    p = jax.tree.map(np.asarray, p)

    def dense(name, x):
        return x @ p[name]["kernel"] + p[name]["bias"]

    mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
    scale, bias = (p["BatchNorm_0"][name].reshape(-1, 1, 1) for name in ("scale", "bias"))
    y = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    z = dense("Dense_0", y)
    d = dense("Dense_1", np.tanh(z).mean((1, 2)))
    mean, var = d.mean(1, keepdims=True), d.var(1, keepdims=True)
    n = (d - mean) / np.sqrt(var + 1e-6) * p["LayerNorm_0"]["scale"] + p["LayerNorm_0"]["bias"]
    names = [f"{layer}:{side}" for layer in AXES for side in ("input", "output")]
    return dict(zip(names, (x, y, z, np.tanh(z), d, n)))


@jax.jit
def told(channels):
    """What is to be compared, in one program."""
    moments = channels.moments
    return {
        "count": moments.count, "size": channels.size, "mean": moments.mean, "var": moments.var,
        "minimum": channels.minimum, "maximum": channels.maximum, "norm": channels.norm,
        "nonfinite": channels.nonfinite, "zeros": channels.zeros, "saturated": channels.saturated,
    }  # fmt: skip


def assert_sees(channels, name, value):
    value = np.moveaxis(np.asarray(value, np.float64), AXES[name.split(":")[0]], -1)
    value = value.reshape(-1, value.shape[-1])
    seen, same = told(channels), np.ones(value.shape[-1])
    expected = {
        "count": len(value) * same,
        "size": len(value) * same,
        "mean": value.mean(0),
        "var": value.var(0),
        "minimum": value.min(0),
        "maximum": value.max(0),
        "nonfinite": 0 * same,
        "zeros": (value == 0).mean(0),
        "norm": np.linalg.norm(value, axis=0),
    }
    if name == "tanh_0:output":
        expected["saturated"] = (1 - value**2 < 0.05).mean(0)
    for what, is_ in expected.items():
        np.testing.assert_allclose(seen[what], is_, **NEAR, err_msg=f"{name} {what}")


@pytest.fixture(scope="module")
def variables():
    return initial(Net(), X)


def apply(variables, x):
    return attach(Net()).apply(variables, x, mutable=["batch_stats"])[0]


@pytest.mark.sample
def test_every_place_shows_its_channels(variables):
    _, seen = jax.jit(observe(apply, channels=True))(variables, X)
    expected = values(variables["params"], X)
    assert set(seen) == set(expected)
    for name, value in expected.items():
        assert_sees(seen[name].channels, name, value)
    plain = jax.eval_shape(observe(apply), variables, X)[1]
    assert list(plain) == list(seen) and not plain.channels


def test_gradients_show_their_channels_too(variables):
    """Against derivatives by what is added at a place, where nothing else is in between."""
    cotangent = RNG.normal(size=(16, 2)).astype(np.float32)

    def training(x):
        return (apply(variables, x) * cotangent).sum()

    slope, seen = jax.jit(observe(jax.grad(training), channels=True))(X)
    expected = {"BatchNorm_0:input": slope, "LayerNorm_0:output": cotangent}
    for name, gradient in expected.items():
        axis = AXES[name.split(":")[0]]
        gradient = np.moveaxis(np.asarray(gradient, np.float64), axis, -1)
        gradient = gradient.reshape(-1, gradient.shape[-1])
        channels = told(seen[name].channel_gradients)
        norm = np.linalg.norm(gradient, axis=0)
        np.testing.assert_allclose(channels["norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(channels["minimum"], gradient.min(0), **NEAR)
        np.testing.assert_allclose(channels["mean"], gradient.mean(0), **NEAR)
    for name in seen:
        of_channels = np.linalg.norm(told(seen[name].channel_gradients)["norm"])
        np.testing.assert_allclose(of_channels, seen[name].gradient.norm, rtol=1e-3)


def test_all_channels_are_sampled_however_few_elements_are(variables):
    _, seen = jax.jit(observe(apply, channels=True, elements=64))(variables, X)
    channels = seen["tanh_0:input"].channels
    assert channels.moments.mean.shape == (5,)
    assert channels.moments.count.tolist() == channels.size.tolist() == 5 * [16 * 4 * 4]


def test_under_vmap(variables):
    both = np.stack([X, 2 * X + 1])
    _, seen = jax.jit(jax.vmap(observe(apply, channels=True), (None, 0)))(variables, both)
    for i in range(2):
        for name, value in values(variables["params"], both[i]).items():
            channels = jax.tree.map(lambda a, i=i: np.asarray(a)[i], seen[name].channels)
            assert_sees(channels, name, value)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.LayerNorm()(x), None


def test_in_a_loop_over_layers_that_are_computed_again():
    scan = nn.scan(
        nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x = X[:, 0, 0]
    variables = initial(scan(), x, None)

    def run(x):
        return attach(scan()).apply(variables, x, None)[0].sum()

    _, seen = jax.jit(observe(jax.grad(run), channels=True))(x)
    for i in range(3):
        name = next(name for name in seen if f"[{i}]:input" in name)
        channels = told(seen[name].channels)
        np.testing.assert_allclose(channels["mean"], x.mean(0), **NEAR)
        np.testing.assert_allclose(channels["var"], x.var(0), **NEAR)
        # Of initialization are a scale of one and a bias of zero.
        x = x + (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)


def loss(y, _):
    return (y**2).mean()


def test_a_recording_has_a_row_of_channels_for_each_sample(tmp_path):
    optimizer, monitor = optax.sgd(0.1), Monitor(every=1, channels=True, elements=None)
    states = [create_train_state(Net(), optimizer, 0, X)]
    step = make_train_step(Net(), optimizer, loss, monitor=monitor, donate=False)
    for _ in range(2):
        states.append(step(states[-1], X)[0])
    Recording(tmp_path).append(states[-1])
    recording = Recording(tmp_path)
    for at in range(2):
        for name, value in values(states[at].params, X).items():
            channels = jax.tree.map(lambda a, i=at: a[i], recording[name].channels)
            assert_sees(channels, name, value)
    assert recording["tanh_0:input"].channels.moments.mean.shape == (2, 5)
