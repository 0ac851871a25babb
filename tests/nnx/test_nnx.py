"""Drop-in for `flax.nnx`: same constructor, same variables, same outputs where Flax is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cotangent
from flax import nnx

import jaxnorm.nnx as jnn
from jaxnorm.testing import assert_close, oracle

pytestmark = pytest.mark.sample

RNG = np.random.default_rng(0)
NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
# Without an offset, where Flax's fast variance still has its digits.
X = jnp.asarray(RNG.normal(size=(4, 5, 5, 6)), jnp.float32)
OPTIONS = {
    "BatchNorm": [{}, {"momentum": 0.7, "use_bias": False}, {"dtype": jnp.bfloat16}],
    "LayerNorm": [{}, {"use_bias": False, "dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}],
    "RMSNorm": [{}, {"use_scale": False}],
    "GroupNorm": [{"num_groups": 3}, {"num_groups": None, "group_size": 2}],
    "InstanceNorm": [{}, {"use_scale": False}],
}
CASES = [(name, options) for name in NORMS for options in OPTIONS[name]]


def make(module, name, options):
    return getattr(module, name)(6, **options, rngs=nnx.Rngs(0))


def shapes(module):
    return jax.tree.map(lambda a: (a.shape, a.dtype), nnx.to_pure_dict(nnx.state(module)))


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_same_variables_and_outputs(name, options):
    ours, theirs = make(jnn, name, options), make(nnx, name, options)
    assert shapes(ours) == shapes(theirs)
    starts = (nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, *starts)
    graph, state = nnx.split(theirs)
    state = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.3 * np.abs(RNG.normal(size=a.shape)), a.dtype),
        state,
    )
    nnx.update(theirs, state)
    nnx.update(ours, state)
    del graph
    got, want = nnx.jit(lambda *layers: [layer(X) for layer in layers])(ours, theirs)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    tolerance = 4e-2 if jnp.bfloat16 in options.values() else 3e-5
    np.testing.assert_allclose(*(np.asarray(a, "f") for a in (got, want)), atol=tolerance)
    for g, w in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs))):
        np.testing.assert_allclose(g, w, atol=2e-2 if jnp.bfloat16 in options.values() else 1e-6)


def test_train_and_eval():
    bn = make(jnn, "BatchNorm", {"momentum": 0.5})
    bn(X)
    before = bn.mean[...]
    bn.eval()
    y = bn(X)
    np.testing.assert_array_equal(bn.mean[...], before)
    np.testing.assert_allclose(y, (X - before) / np.sqrt(bn.var[...] + 1e-5), atol=1e-5)
    bn(X, use_running_average=False)
    assert (bn.mean[...] != before).all()
    bn.train()
    with pytest.raises(ValueError, match="whether to use the running statistics"):
        make(jnn, "BatchNorm", {"use_running_average": None})(X)


def test_running_statistics_are_not_rounded_to_the_input():
    """Flax rounds them to bfloat16 on the way in: an error of 6 where the mean is 1000."""
    bn = make(jnn, "BatchNorm", {"dtype": jnp.bfloat16, "use_running_average": True})
    bn.mean[...] = bn.mean[...] + 1003.0
    x = jnp.full((3, 6), 1004.0, jnp.bfloat16)
    wanted = oracle.batch_norm(
        np.asarray(x), None, None, np.full(6, 1003.0), np.ones(6), training=False
    )[0]
    assert_close(bn(x), wanted)


def test_group_norm_with_reduction_axes():
    """Flax's NNX repeats the statistics along the wrong axis here."""
    layer = make(jnn, "GroupNorm", {"num_groups": 3, "reduction_axes": (1, 3)})
    assert_close(layer(X), oracle.group_norm(np.asarray(X), num_groups=3, axis=(1, 3)))


def test_groups_of_one_example_without_a_batch_axis():
    """As `flax.linen` has it; Flax's NNX fails."""
    layer = make(jnn, "GroupNorm", {"num_groups": 3})
    assert_close(layer(X[0, 0, 0]), oracle.group_norm(np.asarray(X[0, 0, :1]), num_groups=3)[0])


def test_one_example_without_a_batch_axis():
    """It is evaluated, as in Flax, and is no batch to train on."""
    ours, theirs = (make(module, "BatchNorm", {}) for module in (jnn, nnx))
    one = X[0, 0, 0]
    got, wanted = (layer(one, use_running_average=True) for layer in (ours, theirs))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    with pytest.raises(ValueError, match="a batch has an axis beside the features"):
        ours(one)


def test_a_count_exists_only_when_asked_for():
    assert not hasattr(make(jnn, "BatchNorm", {}), "count")
    bn = make(jnn, "BatchNorm", {"momentum": None})
    for i in range(4):
        bn(X + i)
    assert bn.count[...] == 4
    np.testing.assert_allclose(bn.mean[...], X.mean((0, 1, 2)) + 1.5, rtol=1e-5)


def test_promote_dtype_of_the_users_own_is_called():
    seen = []

    def promote(arrays, *, dtype):
        seen.append(dtype)
        return tuple(None if a is None else a.astype(jnp.bfloat16) for a in arrays)

    layer = make(jnn, "LayerNorm", {"promote_dtype": promote})
    assert layer(X).dtype == jnp.bfloat16
    assert seen == [None]


@pytest.mark.parametrize("name, arrays", [("BatchNorm", 5), ("RMSNorm", 2), ("GroupNorm", 3)])
def test_promote_dtype_gets_the_arrays_that_flax_gives_it(name, arrays):
    seen = []

    def promote(arrays, *, dtype):
        seen.append(len(arrays))
        return arrays

    options = {"num_groups": 3} if name == "GroupNorm" else {}
    for module in (jnn, nnx):
        layer = make(module, name, {"promote_dtype": promote, **options})
        nnx.eval_shape(lambda m, x: m(x), layer, X)
    assert seen == [arrays, arrays]


@pytest.mark.parametrize(
    "options", [{"use_bias": False, "use_scale": False}, {"param_dtype": "bfloat16"}], ids=str
)
@pytest.mark.parametrize("name", NORMS)
def test_result_dtype_follows_flax(name, options):
    groups = {"num_groups": 3} if name == "GroupNorm" else {}
    if name == "RMSNorm":
        options = {k: v for k, v in options.items() if k != "use_bias"}
    x = X.astype(jnp.bfloat16)
    layers = (make(module, name, {**options, **groups}) for module in (jnn, nnx))
    got, wanted = (nnx.eval_shape(lambda m, x: m(x), layer, x).dtype for layer in layers)
    assert got == wanted


def test_complex_statistics():
    x = jnp.asarray(np.asarray(X) + 1j * np.asarray(X)[::-1] + 5j, jnp.complex64)
    bn = make(jnn, "BatchNorm", {"param_dtype": jnp.complex64, "momentum": 0.0})
    bn(x)
    np.testing.assert_allclose(bn.mean[...], np.asarray(x).mean((0, 1, 2)), rtol=1e-5)
    with pytest.raises(TypeError, match="running mean of complex data is complex"):
        make(jnn, "BatchNorm", {})(x)


class Net(nnx.Module):
    def __init__(self, norms, *, rngs):
        self.conv = norms.Conv(6, 8, (3, 3), rngs=rngs)
        self.bn = norms.BatchNorm(8, rngs=rngs)
        self.gn = norms.GroupNorm(8, num_groups=4, rngs=rngs)
        self.ln = norms.LayerNorm(8, rngs=rngs)
        self.out = norms.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.ln(self.gn(nnx.relu(self.bn(self.conv(x))))).mean((1, 2)))


def test_split_merge_and_state_of_flax():
    ours, theirs = Net(jnn, rngs=nnx.Rngs(0)), Net(nnx, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(theirs))
    run = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(run(ours, X), run(theirs, X), atol=2e-5)
    graph, params, rest = nnx.split(ours, nnx.Param, ...)
    merged = nnx.merge(graph, params, rest)
    np.testing.assert_allclose(run(merged, X), run(ours, X), atol=1e-5)


def test_jit_and_grad_update_the_statistics_once():
    jitted, plain, one = (make(jnn, "BatchNorm", {}) for _ in range(3))

    def loss(model):
        return (model(X) ** 3).sum()

    got = nnx.jit(nnx.value_and_grad(loss))(jitted)
    want = nnx.value_and_grad(loss)(plain)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-4)
    one(X)
    for model in (jitted, one):
        np.testing.assert_allclose(model.mean[...], plain.mean[...], atol=1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_vmap_and_scan_of_nnx(name):
    options = {"num_groups": 2} if name == "GroupNorm" else {}

    @nnx.vmap(in_axes=0)
    def create(key):
        return getattr(jnn, name)(6, **options, rngs=nnx.Rngs(key))

    @nnx.jit
    def run(layer, x):
        return layer(x)

    x = jnp.asarray(RNG.normal(size=(4, 5, 6)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    y = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(create(keys), x)
    assert y.shape == (3, *x.shape)
    single = make(jnn, name, options)
    np.testing.assert_allclose(np.asarray(y)[1], run(single, x), atol=1e-5)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return layer(x * 1.5 + 0.1)

    got = through(create(keys), x)
    wanted = np.asarray(x)
    for _ in range(3):
        scaled = (wanted * 1.5 + 0.1).astype("f")
        wanted = np.asarray(run(make(jnn, name, options), jnp.asarray(scaled)))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("gain", [False, True])
def test_weight_standardization(gain):
    conv = jnn.Conv(6, 7, (3, 3), rngs=nnx.Rngs(0), weight_standardization=True, use_gain=gain)
    linear = jnn.Linear(6, 7, rngs=nnx.Rngs(0), weight_standardization=True, use_gain=gain)
    for layer, plain, x in (
        (conv, nnx.Conv(6, 7, (3, 3), rngs=nnx.Rngs(0)), X),
        (linear, nnx.Linear(6, 7, rngs=nnx.Rngs(0)), X[:, 0, 0]),
    ):
        before = layer.kernel[...]
        np.testing.assert_array_equal(before, plain.kernel[...])
        if gain:
            layer.gain[...] = jnp.asarray(np.arange(1, 8, dtype="f"))
        plain.kernel[...] = jnp.asarray(
            oracle.standardize_weight(np.asarray(before), np.arange(1.0, 8.0) if gain else None),
            jnp.float32,
        )
        np.testing.assert_allclose(layer(x), plain(x), atol=2e-4)
        # The stored kernel is the raw one: standardizing is not written back.
        np.testing.assert_array_equal(layer.kernel[...], before)
        gradient = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum()))(layer, x)
        assert {"kernel", "bias"} | ({"gain"} if gain else set()) == set(gradient)
        assert np.abs(gradient["kernel"][...]).max() > 0
        np.testing.assert_array_equal(layer.kernel[...], before)


def test_weight_standardization_inside_any_transformation():
    layer = jnn.Linear(6, 7, rngs=nnx.Rngs(0), weight_standardization=True, use_gain=True)
    x = X[0, 0]
    wanted = layer(x)
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: layer(x))(x), wanted, atol=1e-6)
    kernel, gain = np.asarray(layer.kernel[...]), np.asarray(layer.gain[...])
    dy = cotangent(wanted.shape)
    (got,) = jax.vjp(lambda x: layer(x), x)[1](dy)
    exact = np.asarray(dy, float) @ oracle.standardize_weight(kernel, gain).T
    assert_close(got, exact, what="derivative", floor=float(np.abs(exact).max()))
    with pytest.raises(ValueError, match="a gain belongs to a standardized kernel"):
        jnn.Linear(6, 7, rngs=nnx.Rngs(0), use_gain=True)


def test_weight_standardization_refuses_a_masked_kernel():
    with pytest.raises(ValueError, match="masked kernel"):
        jnn.Conv(
            6, 2, (3, 3), mask=jnp.ones((3, 3, 6, 2)), weight_standardization=True,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
