"""Statistics of a whole data set against NumPy's in float64, in both meanings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from tools.drifting import LINEN, NNXNet, ResNet, batches, pooled

from jaxnorm.testing import assert_close
from jaxnorm.tools import adapt, recalibrate

TRAINED = ResNet()


@pytest.fixture(scope="module")
def variables():
    first = TRAINED.init(jax.random.key(0), batches()[0], False)
    rng = np.random.default_rng(5)
    stats = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype),
                         first["batch_stats"])  # fmt: skip
    return {**first, "batch_stats": stats}


def affine(x, mean, var, norm):
    return (x - mean) / np.sqrt(var + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def conv(x, layer):
    """A convolution with zeros around, in float64 as far as its input goes."""
    kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
    height, width = kernel.shape[:2]
    around = ((0, 0), (height // 2,) * 2, (width // 2,) * 2, (0, 0))
    x = np.pad(np.asarray(x, np.float64), around)
    windows = np.lib.stride_tricks.sliding_window_view(x, (height, width), (1, 2))
    return np.einsum("nijchw,hwco->nijo", windows, kernel) + bias


def network(params, data, sequential):
    """The statistics of `ResNet`'s norms, written in NumPy alone: dropout is off."""
    stats: dict = {}

    def norm(block, name, arrays):
        stats[block, name] = whole = pooled(arrays)
        own = [whole if sequential else pooled([array]) for array in arrays]
        return [affine(a, *s, params[block][name]) for a, s in zip(arrays, own)]

    for block in ("first", "second"):
        p = params[block]
        inner = norm(block, "a", [conv(x, p["Conv_0"]) for x in data])
        inner = norm(block, "b", [conv(np.maximum(x, 0), p["Conv_1"]) for x in inner])
        beside = norm(block, "c", [conv(x, p["Conv_2"]) for x in data])
        data = [np.maximum(a + b, 0) for a, b in zip(inner, beside)]
    return stats


@pytest.mark.parametrize("sequential", [False, True])
def test_a_residual_network(variables, sequential):
    data, done = batches(), []
    new = recalibrate(
        TRAINED, variables, data, sequential=sequential, progress=lambda *a: done.append(a)
    )
    for (block, name), (mean, var) in network(variables["params"], data, sequential).items():
        found = new.variables["batch_stats"][block][name]
        assert_close(np.asarray(found["mean"]), mean, conditioning=8)
        assert_close(np.asarray(found["var"]), var, conditioning=8)
    # The shortcut's norm shares the pass of the first in its block.
    assert new.report.passes == (4 if sequential else 1)
    assert done == [(i + 1, 3 * new.report.passes) for i in range(3 * new.report.passes)]
    # All else are the same arrays.
    for name in ("params", "notes"):
        leaves = jax.tree.leaves(new.variables[name]), jax.tree.leaves(variables[name])
        assert all(a is b for a, b in zip(*leaves, strict=True))
    assert new.model is TRAINED and new.report.kept == ()
    assert new.report.examples == 17 and new.report.batches == 3
    assert {each.count for each in new.report.layers} == {17 * 25}


def test_the_report_holds_the_divergence_of_normal_distributions(variables):
    new = recalibrate(TRAINED, variables, iter(batches()), layers="first/*")
    assert [each.layer for each in new.report.layers] == ["first/a", "first/b", "first/c"]
    for each in new.report.layers:
        name = each.layer.split("/")[1]
        old, now = (v["batch_stats"]["first"][name] for v in (variables, new.variables))
        m0, v0, m1, v1 = (np.asarray(s[k], np.float64) for s in (old, now) for k in ("mean", "var"))
        wanted = 0.5 * (np.log(v0 / v1) + (v1 + (m1 - m0) ** 2) / v0 - 1)
        np.testing.assert_allclose(each.divergence, wanted, rtol=1e-6)
    largest = max(new.report.layers, key=lambda each: each.mean_divergence)
    assert str(new.report).splitlines()[2].startswith(largest.layer)
    leaves = (jax.tree.leaves(v["batch_stats"]["second"]) for v in (variables, new.variables))
    assert all(a is b for a, b in zip(*leaves))


@pytest.mark.parametrize("sequential", [False, True])
def test_an_nnx_network_is_copied(sequential):
    model = NNXNet(nnx.Rngs(0))
    before = nnx.state(model)
    kept = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat, nnx.Param))
    data = batches()
    new = recalibrate(model, data, sequential=sequential)
    first = [conv(x, dict(kernel=model.conv.kernel[...], bias=model.conv.bias[...])) for x in data]
    mean, var = pooled(first)
    assert_close(np.asarray(new.model.norms[0].mean[...]), mean, conditioning=8)
    assert_close(np.asarray(new.model.norms[0].var[...]), var, conditioning=8)
    own = [(mean, var) if sequential else pooled([x]) for x in first]
    second = [np.maximum((x - m) / np.sqrt(v + 1e-5), 0) for x, (m, v) in zip(first, own)]
    layer = dict(kernel=model.between.kernel[...], bias=model.between.bias[...])
    mean, var = pooled([conv(x, layer) for x in second])
    n = 17 * 25
    assert_close(np.asarray(new.model.norms[1].mean[...]), mean, conditioning=8)
    assert_close(np.asarray(new.model.norms[1].var[...]), var * n / (n - 1), conditioning=8)
    assert type(new.model.norms[1]) is type(model.norms[1]) and new.variables is None
    assert jax.tree.structure(nnx.state(new.model)) == jax.tree.structure(before)
    for a, b in zip(
        *(jax.tree.leaves(s) for s in (kept, nnx.state(model, nnx.BatchStat, nnx.Param)))
    ):
        np.testing.assert_array_equal(a, b)
    assert new.model.conv.kernel.get_value() is model.conv.kernel.get_value()
    assert new.model.norms[0].use_running_average == model.norms[0].use_running_average


@pytest.mark.parametrize("make", [nn.BatchNorm, LINEN.BatchNorm])
def test_thousands_of_batches_far_from_zero(make):
    model = make(use_running_average=True)
    rng = np.random.default_rng(1)
    drift = np.linspace(-1, 1, 2000)[:, None, None]
    data = np.float32(1e4 + drift + rng.normal(size=(2000, 8, 3)) * [0.5, 1, 2])
    new = recalibrate(model, model.init(jax.random.key(0), data[0]), data)
    mean, var = pooled([data])
    found = new.variables["batch_stats"]
    assert_close(np.asarray(found["mean"]), mean)
    assert_close(np.asarray(found["var"]), var)


class Masked(nn.Module):
    """A norm over two axes of features, another over channels that are not last, and a mask."""

    @nn.compact
    def __call__(self, x, mask):
        nn.BatchNorm(True, axis=(2, 3), name="two")(x, mask=mask)
        return LINEN.BatchNorm(None, axis=1, unbiased=True, name="one")(x, True, mask=mask)


def test_masks_and_axes():
    data, rng = batches(3), np.random.default_rng(2)
    data = [(x, rng.random((len(x), 1, 1, 1)) < 0.6) for x in data]
    model = Masked()
    variables = model.init(jax.random.key(0), *data[0])
    new = recalibrate(model, freeze(variables), data, inputs=lambda batch: tuple(batch))
    stats = new.variables["batch_stats"]
    rows = np.concatenate([x[mask[:, 0, 0, 0]] for x, mask in data]).astype(float)
    n = rows.size / rows.shape[1]
    assert_close(np.asarray(stats["two"]["mean"]), rows.mean((0, 1)))
    assert_close(np.asarray(stats["two"]["var"]), rows.var((0, 1)))
    assert_close(np.asarray(stats["one"]["mean"]), rows.mean((0, 2, 3)))
    assert_close(np.asarray(stats["one"]["var"]), rows.var((0, 2, 3)) * n / (n - 1))
    assert [each.count for each in new.report.layers] == [rows.shape[0] * 5, n]
    assert type(new.variables) is type(freeze({}))


def test_a_mask_that_leaves_nothing_changes_nothing():
    model = Masked()
    x = batches()[0]
    variables = model.init(jax.random.key(0), x, np.ones((7, 1, 1, 1)))
    new = recalibrate(model, variables, [(x, np.zeros((7, 1, 1, 1)))], inputs=tuple)
    for a, b in zip(*(jax.tree.leaves(v["batch_stats"]) for v in (variables, new.variables))):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("weight", [0, 5.0])
def test_adapting_averages_means_and_variances(weight):
    model = LINEN.BatchNorm(use_running_average=True)
    data = batches()
    source = model.init(jax.random.key(0), data[0])
    source["batch_stats"] = {"mean": jnp.array([1.0, -2, 3]), "var": jnp.array([4.0, 0.5, 2])}
    new = adapt(model, source, data, source_weight=weight)
    for name, target in zip(("mean", "var"), pooled(data)):
        old = np.asarray(source["batch_stats"][name], np.float64)
        wanted = (weight * old + 17 * target) / (weight + 17)
        assert_close(np.asarray(new.variables["batch_stats"][name]), wanted)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="a")(x)
        return LINEN.BatchNorm(use_running_average=True, name="b")(x**2)


def test_the_mixture_is_what_later_norms_see():
    data = batches()
    source = Pair().init(jax.random.key(0), data[0])
    new = adapt(Pair(), source, data, source_weight=9, sequential=True)
    mean, var = ((9 * old + 17 * target) / 26 for old, target in zip((0, 1), pooled(data)))
    target = pooled([(x.astype(float) - mean) ** 2 / (var + 1e-5) for x in data])
    for name, old, wanted in zip(("mean", "var"), (0, 1), target):
        found = new.variables["batch_stats"]["b"][name]
        assert_close(np.asarray(found), (9 * old + 17 * wanted) / 26, conditioning=4)
