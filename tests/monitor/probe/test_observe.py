"""What is seen at a place is what is there: against a forward pass written out by hand."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import initial
from flax import nnx

from jaxnorm.monitor import EDGES, attach, observe

WIDTH = 6


class Net(nn.Module):
    """Dense, layer norm, tanh, dense, batch norm, relu, dense."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.tanh(nn.LayerNorm()(nn.Dense(WIDTH)(x)))
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x)))
        return nn.Dense(2)(x)


PLACES = ["LayerNorm_0", "tanh_0", "BatchNorm_0", "relu_0"]


@jax.jit
def by_hand(params, x, target):
    """The values at each place, and the loss's gradient there."""
    p, values, gradients = params, {}, {}

    def dense(i, x):
        return x @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]

    def normalize(name, x, axis, epsilon):
        mean = x.mean(axis, keepdims=True)
        var = ((x - mean) ** 2).mean(axis, keepdims=True)
        return (x - mean) / jnp.sqrt(var + epsilon) * p[name]["scale"] + p[name]["bias"]

    stages = [
        ("LayerNorm_0:input", lambda x: dense(0, x)),
        ("LayerNorm_0:output", lambda x: normalize("LayerNorm_0", x, -1, 1e-6)),
        ("tanh_0:input", lambda x: x),
        ("tanh_0:output", jnp.tanh),
        ("BatchNorm_0:input", lambda x: dense(1, x)),
        ("BatchNorm_0:output", lambda x: normalize("BatchNorm_0", x, 0, 1e-5)),
        ("relu_0:input", lambda x: x),
        ("relu_0:output", lambda x: jnp.maximum(x, 0)),
        ("", lambda x: dense(2, x)),
    ]
    for i, (name, stage) in enumerate(stages):
        x = stage(x)

        def from_here(x, i=i):
            for _, stage in stages[i + 1 :]:
                x = stage(x)
            return loss_of(x, target)

        values[name], gradients[name] = x, jax.grad(from_here)(x)
    return values, gradients


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (32, 4)).astype(np.float32)
    target = rng.normal(size=(32, 2)).astype(np.float32)
    return initial(Net(), x, False), x, target


def loss_of(y, target):
    return ((y - target) ** 2).sum()


def training(model):
    """A function whose gradients are taken, as in a training step."""

    def step(variables, x, target):
        def loss(params):
            given = {**variables, "params": params}
            y, _ = model.apply(given, x, True, mutable=["batch_stats"])
            return loss_of(y, target)

        return jax.value_and_grad(loss)(variables["params"])

    return step


observed = jax.jit(observe(training(attach(Net()))))


def assert_sees(observation, value, gradient):
    value, gradient = np.asarray(value, np.float64), np.asarray(gradient, np.float64)
    near = {"rtol": 1e-4, "atol": 1e-5}
    seen = observation.value
    assert seen.size == seen.moments.count == value.size
    np.testing.assert_allclose(seen.moments.mean, value.mean(), **near)
    np.testing.assert_allclose(seen.moments.var, value.var(), **near)
    np.testing.assert_allclose(seen.minimum, value.min(), **near)
    np.testing.assert_allclose(seen.maximum, value.max(), **near)
    np.testing.assert_allclose(seen.zeros, (value == 0).mean(), atol=1e-6)
    counts = np.histogram(value, [-np.inf, *EDGES, np.inf])[0]
    assert abs(np.asarray(seen.histogram) - counts).sum() <= 4  # those that lie on an edge
    np.testing.assert_allclose(observation.gradient.norm, np.linalg.norm(gradient), rtol=1e-3)
    np.testing.assert_allclose(
        observation.gradient.moments.mean, gradient.mean(), rtol=1e-2, atol=1e-4
    )


@pytest.mark.sample
def test_every_place_shows_its_value_and_its_gradient(given):
    variables, x, target = given
    values, gradients = by_hand(variables["params"], x, target)
    (loss, grads), seen = observed(variables, x, target)
    assert list(seen) == [f"{layer}:{side}" for layer in PLACES for side in ("input", "output")]
    for name in seen:
        assert_sees(seen[name], values[name], gradients[name])
    # And what the function itself returns is what it returns without marks.
    plain = jax.jit(training(Net()))(variables, x, target)
    np.testing.assert_allclose(loss, plain[0], rtol=1e-6)
    # A bias before a batch norm has a gradient of rounding errors.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), grads, plain[1]
    )


def test_shares(given):
    variables, x, target = given
    values, _ = by_hand(variables["params"], 30 * x, target)
    _, seen = observed(variables, 30 * x, target)
    flat = 1 - np.asarray(values["tanh_0:output"], np.float64) ** 2 < 0.05
    np.testing.assert_allclose(seen["tanh_0:output"].value.saturated, flat.mean(), atol=2e-2)
    dead = (np.asarray(values["relu_0:output"]) == 0).all(0).mean()
    np.testing.assert_allclose(seen["relu_0:output"].value.dead, dead)
    assert seen["relu_0:output"].value.saturated == seen["relu_0:output"].value.zeros
    assert seen["LayerNorm_0:output"].value.saturated == 0


def test_a_batch_norm_shows_its_batch_beside_its_running_statistics(given):
    variables, x, target = given
    values, _ = by_hand(variables["params"], x, target)
    mean = np.arange(6, dtype=np.float32)
    stats = {"BatchNorm_0": {"mean": mean, "var": mean + 1}}
    _, seen = observed({**variables, "batch_stats": stats}, x, target)
    batch = seen["BatchNorm_0:input"].batch
    there = np.asarray(values["BatchNorm_0:input"], np.float64)
    np.testing.assert_allclose(batch.moments.mean, there.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch.moments.var, there.var(0), rtol=1e-4)
    np.testing.assert_array_equal(batch.running_mean, stats["BatchNorm_0"]["mean"])
    np.testing.assert_array_equal(batch.running_var, stats["BatchNorm_0"]["var"])
    assert batch.examples == batch.independent == 32
    assert seen["LayerNorm_0:input"].batch is None


def test_independent_numbers_in_a_batch():
    # Pixels of an image share a part of their variance; what a channel's mean then varies by is
    # known, and that is what the number of independent ones has to say.
    norm = nn.BatchNorm(use_running_average=False)
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(64, 1, 1, 8)), rng.normal(size=(64, 6, 6, 8))
    variables = initial(norm, own)
    run = jax.jit(observe(lambda x: attach(norm).apply(variables, x, mutable=["batch_stats"])))
    for alike in (0.0, 0.5, 1.0):
        x = np.sqrt(alike) * shared + np.sqrt(1 - alike) * own
        _, seen = run(x.astype(np.float32))
        independent = float(seen["BatchNorm:input"].batch.independent)
        np.testing.assert_allclose(
            independent, 64 * 36 / (1 + 35 * alike), rtol=0.25, err_msg=f"{alike=}"
        )  # fmt: skip


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.gelu(nn.LayerNorm()(nn.Dense(WIDTH)(x))), None


class Deep(nn.Module):
    """Four blocks, one after the other, or in one scan over their parameters."""

    scanned: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        block = nn.remat(Block, prevent_cse=not self.scanned) if self.remat else Block
        if not self.scanned:
            for i in range(4):
                x, _ = block(name=f"block_{i}")(x)
            return x[:, :2]
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        return scan(name="blocks")(x, None)[0][:, :2]


@pytest.fixture(scope="module")
def deep(given):
    """What is seen of either, with `remat` or without, each of the same parameters."""
    _, x, target = given
    x = np.tile(x, (1, 2))[:, :WIDTH]
    variables = initial(Deep(False), x)
    blocks = [variables["params"][f"block_{i}"] for i in range(4)]
    stacked = {"params": {"blocks": jax.tree.map(lambda *a: np.stack(a), *blocks)}}

    @functools.cache
    def seen(scanned, remat):
        run = jax.jit(observe(training(attach(Deep(scanned, remat)))))
        return run(stacked if scanned else variables, x, target)[1]

    return seen


@pytest.mark.sample
@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_layers_shows_each_of_them(deep, remat):
    one_by_one, scanned = deep(False, False), deep(True, remat)
    assert len(one_by_one) == 16
    # And in the order in which they run: all of one block, then all of the next.
    names = [re.fullmatch(r"block_(.)/(.*):(.*)", name).groups() for name in one_by_one]
    assert list(scanned) == [f"blocks/{layer}[{i}]:{side}" for i, layer, side in names]
    for i in range(4):
        for name in ("LayerNorm_0:input", "gelu_0:output"):
            layer, side = name.split(":")
            a, b = one_by_one[f"block_{i}/{name}"], scanned[f"blocks/{layer}[{i}]:{side}"]
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), a, b)


def test_remat_shows_the_same_once(deep):
    plain, again = deep(False, False), deep(False, True)
    assert list(plain) == list(again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)


def test_seeds_under_vmap(given):
    variables, x, target = given
    several = jax.tree.map(lambda a: np.stack([a, 1.5 * a]), variables)
    together = jax.jit(jax.vmap(observed, in_axes=(0, None, None)))(several, x, target)
    for i in range(2):
        alone = observed(jax.tree.map(lambda a, i=i: a[i], several), x, target)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-3, atol=1e-4),
            together, alone,
        )  # fmt: skip


@jax.jit
def compiled_before(params, x):
    return nn.relu(nn.LayerNorm().apply({"params": params}, x))


class InParts(nn.Module):
    """Parts that are compiled by themselves, and arguments by name."""

    @nn.compact
    def __call__(self, x):
        x = nn.jit(Block)(name="one")(x)[0]
        x = nn.jit(Block)(name="two")(x)[0]
        x = nn.LayerNorm(name="named")(x=x)
        return compiled_before({"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}, x)


def test_parts_that_were_compiled_before_are_seen_too():
    x = np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)
    variables = initial(InParts(), x)
    plain = InParts().apply(variables, x)  # which compiles them without marks
    y, seen = jax.jit(observe(attach(InParts()).apply))(variables, x)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    norms = ["one/LayerNorm_0", "one/gelu_0", "two/LayerNorm_0", "two/gelu_0", "named",
             "LayerNorm", "relu_0"]  # fmt: skip
    assert list(seen) == [f"{norm}:{side}" for norm in norms for side in ("input", "output")]
    assert seen["two/LayerNorm_0:input"].value.norm != seen["one/LayerNorm_0:input"].value.norm
    # And nothing of it stays behind.
    text = str(jax.make_jaxpr(InParts().apply)(variables, x))
    assert "jaxnorm_mark" not in text


class Small(nnx.Module):
    """The same net."""

    def __init__(self, rngs):
        self.dense = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in ((4, WIDTH), (WIDTH, WIDTH), (WIDTH, 2))]
        )
        self.layer = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.batch = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.layer(self.dense[0](x)))
        return self.dense[2](nnx.relu(self.batch(self.dense[1](x))))


@pytest.mark.sample
def test_nnx_shows_what_linen_shows(given):
    variables, x, target = given
    _, expected = observed(variables, x, target)
    model, p = nnx.jit(lambda: Small(nnx.Rngs(0)))(), variables["params"]
    for i, layer in enumerate(model.dense):
        layer.kernel[...], layer.bias[...] = p[f"Dense_{i}"]["kernel"], p[f"Dense_{i}"]["bias"]
    before = model.batch.mean[...]
    graph, state = nnx.split(attach(model))

    def step(state, x, target):
        watched = nnx.merge(graph, state)
        loss, _ = nnx.value_and_grad(lambda m: loss_of(m(x), target))(watched)
        return loss, nnx.state(watched, nnx.BatchStat)

    (_, stats), seen = jax.jit(observe(step))(state, x, target)
    names = {"layer": "LayerNorm_0", "batch": "BatchNorm_0"}
    assert len(seen) == len(expected) == 8
    for name in seen:
        layer, side = name.split(":")
        theirs = expected[f"{names.get(layer, layer)}:{side}"]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), seen[name], theirs
        )
    # The statistics were updated once, and the model that was attached to is as it was.
    moved = 0.01 * seen["batch:input"].batch.moments.mean
    np.testing.assert_allclose(stats["model"]["batch"]["mean"][...], moved, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(model.batch.mean[...], before)
