"""Drop-in for `flax.linen`: same constructor, same variables, same outputs where Flax is right."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

import jaxnorm.linen as jnn
from jaxnorm.testing import assert_close, oracle

pytestmark = pytest.mark.sample

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
# Without an offset, where Flax's fast variance still has its digits.
X = jnp.asarray(RNG.normal(size=(4, 5, 5, 6)), jnp.float32)

OPTIONS = {
    "BatchNorm": [
        {},
        {"axis": 1},
        {"axis": (1, -1)},
        {"momentum": 0.7, "use_bias": False},
        {"use_scale": False, "epsilon": 1e-3},
        {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16},
        {"use_fast_variance": False},
    ],
    "LayerNorm": [
        {},
        {"reduction_axes": (1, 2), "feature_axes": -1},
        {"reduction_axes": (2, 3), "feature_axes": (2, 3)},
        {"use_bias": False, "dtype": jnp.bfloat16},
    ],
    "RMSNorm": [{}, {"reduction_axes": (-2, -1)}, {"use_scale": False}],
    "GroupNorm": [
        {"num_groups": 3},
        {"num_groups": None, "group_size": 2},
        {"num_groups": 2, "reduction_axes": (1, 3)},
        {"num_groups": 2, "reduction_axes": (-1,), "use_scale": False},
    ],
    "InstanceNorm": [{}, {"feature_axes": (1, -1)}, {"use_bias": False}],
}
CASES = [(name, options) for name in NORMS for options in OPTIONS[name]]


def make(module, name, options):
    extra = {"use_running_average": False} if name == "BatchNorm" else {}
    return getattr(module, name)(**extra, **options)


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_same_variables_and_outputs(name, options):
    layers = [make(module, name, options) for module in (jnn, nn)]
    variables, wanted = jax.jit(lambda: [layer.init(KEY, X) for layer in layers])()
    assert shapes(variables) == shapes(wanted)
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    stirred = jax.tree.map(
        lambda a: (np.asarray(a) + 0.3 * np.abs(RNG.normal(size=a.shape))).astype(a.dtype), wanted
    )
    mutable = ["batch_stats"] if name == "BatchNorm" else False
    apply = jax.jit(lambda v: [layer.apply(v, X, mutable=mutable) for layer in layers])
    got, want = apply(stirred)
    tolerance = 3e-2 if jnp.bfloat16 in options.values() else 3e-5
    assert shapes(got) == shapes(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(*(np.asarray(a, "f") for a in (g, w)), atol=tolerance)


def test_evaluation_writes_nothing_and_matches_flax():
    bn, flax_bn = jnn.BatchNorm(True), nn.BatchNorm(True)
    variables = bn.init(KEY, X)
    variables["batch_stats"]["mean"] += 2
    y, after = bn.apply(variables, X, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], after["batch_stats"])
    np.testing.assert_allclose(y, jax.jit(flax_bn.apply)(variables, X), atol=2e-6)


def test_initialization_updates_nothing_and_needs_no_axis():
    for layer in (jnn.BatchNorm(False, axis_name="nowhere"), jnn.LayerNorm(axis_name="nowhere")):
        variables = layer.init(KEY, X)
    bn = jnn.BatchNorm(False, axis_name="nowhere")
    assert (bn.init(KEY, X)["batch_stats"]["mean"] == 0).all()
    with pytest.raises(ValueError, match="axis_name='nowhere' is not bound"):
        bn.apply(bn.init(KEY, X), X, mutable=["batch_stats"])
    del variables


@pytest.mark.parametrize(("shape", "axis"), [((4,), -1), ((4,), 0), ((3, 4), (0, 1))])
def test_batch_norm_starts_from_one_example_as_flax(shape, axis):
    x = np.arange(float(np.prod(shape)), dtype="f").reshape(shape)
    ours, theirs = (
        module.BatchNorm(use_running_average=False, axis=axis).init_with_output(KEY, x)
        for module in (jnn, nn)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_one_example_without_a_batch_axis():
    """It initializes a batch norm, as in Flax, and is no batch to train on; groups need none."""
    one = X[0, 0, 0]
    (y, variables), (_, wanted) = (m.BatchNorm(False).init_with_output(KEY, one) for m in (jnn, nn))
    jax.tree.map(np.testing.assert_array_equal, variables, wanted)
    assert y.shape == one.shape
    with pytest.raises(ValueError, match="a batch has an axis beside the features"):
        jnn.BatchNorm(False).apply(variables, one, mutable=["batch_stats"])
    ours, theirs = (m.GroupNorm(num_groups=3) for m in (jnn, nn))
    variables = jax.tree.map(lambda a: a + RNG.normal(size=a.shape), theirs.init(KEY, one))
    wanted = theirs.apply(variables, one)
    np.testing.assert_allclose(ours.apply(variables, one), wanted, atol=1e-6)
    mapped = jax.vmap(lambda x: ours.apply(variables, x))(X[0, 0])
    np.testing.assert_allclose(mapped, ours.apply(variables, X[0, 0]), atol=1e-6)


def test_a_model_of_one_example_under_nested_vmap():
    """The batch is two named axes; shared statistics come out unbatched (flax#3319)."""
    shared = {
        "variable_axes": {"params": None, "batch_stats": None},
        "split_rngs": {"params": False},
    }
    inner = nn.vmap(jnn.BatchNorm, axis_name="inner", **shared)
    both = nn.vmap(inner, axis_name="outer", **shared)
    layer = both(use_running_average=False, axis_name=("inner", "outer"), momentum=0.0)
    x = X[:, :, 0]

    @jax.jit
    def run(x):
        return layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])

    y, new = run(x)
    wanted = oracle.batch_norm(np.asarray(x), None, None, np.zeros(6), np.ones(6), training=True)[0]
    assert_close(y, wanted)
    np.testing.assert_allclose(new["batch_stats"]["mean"], x.mean((0, 1)), atol=1e-6)


def test_a_count_exists_only_when_asked_for():
    assert set(jnn.BatchNorm(False).init(KEY, X)["batch_stats"]) == {"mean", "var"}
    for options in ({"debias": True}, {"momentum": None}):
        bn = jnn.BatchNorm(False, **options)
        variables = bn.init(KEY, X)
        assert set(variables["batch_stats"]) == {"mean", "var", "count"}
        for i in range(3):
            _, new = bn.apply(variables, X + i, mutable=["batch_stats"])
            variables = {**variables, **new}
        assert variables["batch_stats"]["count"] == 3
    # The cumulative average and, at equal weight, nothing of the initial 0 and 1.
    stats, x = variables["batch_stats"], np.asarray(X)
    np.testing.assert_allclose(stats["mean"], x.mean((0, 1, 2)) + 1, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], x.var((0, 1, 2)), rtol=1e-4)


def test_running_statistics_keep_their_dtype_under_x64():
    with jax.enable_x64(True):
        bn = jnn.BatchNorm(False)
        x = jax.ShapeDtypeStruct(X.shape, np.float64)
        variables = jax.eval_shape(bn.init, KEY, x)
        _, new = jax.eval_shape(partial(bn.apply, mutable=["batch_stats"]), variables, x)
        assert {a.dtype for a in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_running_statistics_keep_their_dtype_in_bfloat16():
    """Flax's are float32 after a step: a retrace, a broken donation."""
    bn = jnn.BatchNorm(False, force_float32_reductions=False, param_dtype=jnp.bfloat16)
    variables = jax.eval_shape(bn.init, KEY, X)
    _, new = jax.eval_shape(partial(bn.apply, mutable=["batch_stats"]), variables, X)
    assert {a.dtype for a in jax.tree.leaves((variables, new))} == {jnp.dtype("bfloat16")}


class Block(nn.Module):
    """A model whose only import that differs is where the norms come from."""

    norms: object

    @nn.compact
    def __call__(self, x, train):
        n = self.norms
        x = n.Conv(8, (3, 3), use_bias=False)(x)
        x = nn.relu(n.BatchNorm(not train)(x))
        x = n.GroupNorm(4)(n.Conv(8, (3, 3))(x))
        x = n.InstanceNorm()(x)
        x = n.Dense(16)(n.LayerNorm()(x.reshape(x.shape[0], -1)))
        return n.RMSNorm()(x)


class FlaxNamespace:
    BatchNorm, GroupNorm, InstanceNorm = nn.BatchNorm, nn.GroupNorm, nn.InstanceNorm
    LayerNorm, RMSNorm, Conv, Dense = nn.LayerNorm, nn.RMSNorm, nn.Conv, nn.Dense


def test_a_checkpoint_of_flax_loads_unchanged():
    theirs, ours = Block(FlaxNamespace), Block(jnn)
    first, second = jax.jit(lambda: [m.init(KEY, X, train=True) for m in (theirs, ours)])()
    variables = serialization.from_bytes(second, serialization.to_bytes(first))
    for train in (True, False):
        got, want = (
            jax.jit(lambda v, m=m, t=train: m.apply(v, X, t, mutable=["batch_stats"]))(variables)
            for m in (ours, theirs)
        )
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, atol=2e-5)


@pytest.mark.parametrize("name", NORMS)
def test_transforms_of_linen(name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}
    x = RNG.normal(size=(4, 5, 6)).astype("f")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return make(jnn, name, options)(x), None

    collections = {"params": 0, "batch_stats": 0}
    split = {"params": True}

    def initialized(net, *arguments):
        """Variables, no two of which are alike."""
        return jax.tree.map(
            lambda a: np.asarray(a) + RNG.uniform(size=a.shape).astype(a.dtype),
            jax.jit(net.init)(KEY, *arguments),
        )

    @jax.jit
    def single_layer(variables, x):
        (y, _), new = Net().apply(variables, x, mutable=["batch_stats"])
        return y, new

    def of_one(tree, at):
        return jax.tree.map(lambda a: np.asarray(a)[at], tree)

    def applied(net, *arguments):
        return jax.jit(partial(net.apply, mutable=["batch_stats"]))(*arguments)

    scanned = nn.scan(Net, variable_axes=collections, split_rngs=split, length=3)()
    variables = initialized(scanned, x)
    (y, _), new = applied(scanned, variables, x, None)
    wanted = x
    for i in range(3):
        wanted, statistics = single_layer(of_one(variables, i), wanted)
        jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), of_one(new, i), statistics)
    np.testing.assert_allclose(y, wanted, atol=1e-5)

    twice = nn.vmap(
        nn.vmap(Net, variable_axes=collections, split_rngs=split),
        variable_axes=collections, split_rngs=split,
    )()  # fmt: skip
    # Each of 2 x 2 layers has its input, parameters and statistics.
    both = RNG.normal(size=(2, 2, *x.shape)).astype("f")
    variables = initialized(twice, both)
    (y, _), new = applied(twice, variables, both)
    for at in np.ndindex(2, 2):
        one, statistics = single_layer(of_one(variables, at), both[at])
        np.testing.assert_allclose(of_one(y, at), one, atol=1e-5)
        for g, w in zip(*map(jax.tree.leaves, (of_one(new, at), statistics)), strict=True):
            np.testing.assert_allclose(g, w, atol=1e-5)

    remat = nn.remat(Net)()
    variables = initialized(remat, x)
    params = {k: v for k, v in variables.items() if k == "params"}

    @jax.jit
    def gradients(params):
        def loss(params, net):
            (y, _), new = net.apply({**variables, **params}, x, mutable=["batch_stats"])
            return (y**3).sum(), new

        return [jax.grad(loss, has_aux=True)(params, net) for net in (remat, Net())]

    for g, w in zip(*map(jax.tree.leaves, gradients(params))):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gain", [False, True])
def test_weight_standardization(gain):
    for layer, x in ((jnn.Conv(7, (3, 3)), X), (jnn.Dense(7), X[:, 0, 0])):
        weighted = layer.clone(weight_standardization=True, use_gain=gain)
        plain, variables = jax.jit(
            lambda x, both=(layer, weighted): [m.init(KEY, x) for m in both]
        )(x)
        assert set(variables["params"]) == {"kernel", "bias"} | ({"gain"} if gain else set())
        np.testing.assert_array_equal(variables["params"]["kernel"], plain["params"]["kernel"])
        if gain:
            variables["params"]["gain"] = np.arange(1, 8, dtype="f")
        kernel = oracle.standardize_weight(
            np.asarray(plain["params"]["kernel"]), np.arange(1.0, 8.0) if gain else None
        )
        flax_layer = nn.Conv(7, (3, 3)) if isinstance(layer, jnn.Conv) else nn.Dense(7)
        params = {"kernel": kernel.astype("f"), "bias": plain["params"]["bias"]}
        np.testing.assert_allclose(
            jax.jit(weighted.apply)(variables, x),
            jax.jit(flax_layer.apply)({"params": params}, x),
            atol=2e-4,
        )


def test_weight_standardization_refuses_a_masked_kernel():
    conv = jnn.Conv(2, (3, 3), mask=jnp.ones((3, 3, 6, 2)), weight_standardization=True)
    with pytest.raises(ValueError, match="masked kernel"):
        conv.init(KEY, X)


def test_complex_statistics_are_complex_from_the_start():
    x = np.asarray(X) + 1j * np.asarray(X)[::-1]
    bn = jnn.BatchNorm(False)
    variables = jax.jit(bn.init)(KEY, x)
    apply = jax.jit(partial(bn.apply, mutable=["batch_stats"]))
    y, new = apply(variables, x)
    assert shapes(variables["batch_stats"]) == shapes(new["batch_stats"])
    # A checkpoint of Flax's holds a real mean before the first update.
    real = {"mean": np.zeros(6, "f"), "var": np.ones(6, "f")}
    after, _ = apply({**variables, "batch_stats": real}, x)
    np.testing.assert_array_equal(after, y)


def test_scale_offset():
    x = X[:, 0, 0]
    norm = jnn.RMSNorm(scale_offset=1.0, scale_init=nn.initializers.zeros)
    y, variables = norm.init_with_output(KEY, x)
    assert_close(y, oracle.rms_norm(np.asarray(x)))
    assert (variables["params"]["scale"] == 0).all()


def test_bad_use_running_average():
    with pytest.raises(TypeError, match="BatchNorm: use_running_average must be a Python bool"):
        jnn.BatchNorm().init(KEY, X, use_running_average=1)


@pytest.mark.parametrize("name", NORMS)
def test_integers_are_refused(name):
    layer = make(jnn, name, {"num_groups": 2} if name == "GroupNorm" else {})
    with pytest.raises(TypeError, match=f"{name}: x must hold floating"):
        layer.init(KEY, jnp.ones((2, 3, 4), int))


def test_unbiased_running_variance():
    bn = jnn.BatchNorm(False, momentum=0.0, unbiased=True)
    _, new = bn.apply(bn.init(KEY, X), X, mutable=["batch_stats"])
    np.testing.assert_allclose(
        new["batch_stats"]["var"], np.asarray(X).var((0, 1, 2), ddof=1), rtol=1e-5
    )
    assert isinstance(bn, nn.BatchNorm)
