"""NNX's SpectralNorm and WeightNorm: Linen's numbers, and unchanged parameters of the layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import name_of
from flax import nnx

import jaxnorm.nnx as jnn

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(4, 5, 5, 6)), jnp.float32)
NAMES = ("SpectralNorm", "WeightNorm")


class Block(nnx.Module):
    """A layer to be wrapped, with submodules, and statistics of its own."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(6, 4, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(4, momentum=0.0, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.bn(self.conv(x))))


LAYERS = {
    "linear": lambda rngs: nnx.Linear(6, 4, rngs=rngs),
    "conv": lambda rngs: nnx.Conv(6, 4, (3, 3), rngs=rngs),
    "block": Block,
}
OPTIONS = {
    "SpectralNorm": [{}, {"n_steps": 3}, {"n_steps": 0}, {"dtype": jnp.bfloat16}],
    "WeightNorm": [
        {},
        {"use_scale": False},
        {"feature_axes": None},
        {"epsilon": 0.5, "dtype": jnp.bfloat16},
        {"variable_filter": nnx.PathContains("bias")},
    ],
}
CASES = [
    *((name, layer, {}) for name in NAMES for layer in LAYERS),
    *((name, "linear", options) for name in NAMES for options in OPTIONS[name][1:]),
]


def make(module, name, layer="linear", **options):
    rngs = nnx.Rngs(0)
    return getattr(module, name)(LAYERS[layer](rngs), **options, rngs=rngs)


def stirred(state):
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.2 * RNG.normal(size=a.shape), a.dtype), state
    )


def kernels(module):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module.layer_instance, nnx.Param)))


@pytest.mark.sample
@pytest.mark.parametrize("name, layer, options", CASES, ids=name_of)
def test_results_and_variables_as_flax(name, layer, options):
    """The first result of Flax's layer; it overwrites the parameters then."""
    ours, theirs = (make(module, name, layer, **options) for module in (jnn, nnx))
    states = [nnx.to_pure_dict(nnx.state(m)) for m in (ours, theirs)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    jax.tree.map(np.testing.assert_array_equal, *states)
    before = kernels(ours)
    tolerance = 2e-2 if jnp.bfloat16 in options.values() else 2e-5
    run = nnx.jit(lambda m, x: m(x))
    got, wanted = run(ours, X), run(theirs, X)
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_allclose(*(np.asarray(y, "f") for y in (got, wanted)), atol=tolerance)
    jax.tree.map(np.testing.assert_array_equal, kernels(ours), before)
    # What else they store is alike: singular vectors and values, statistics of a wrapped layer.
    rest = [nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (ours, theirs)]
    for g, w in zip(*map(jax.tree.leaves, rest), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_training_moves_the_raw_parameters_as_in_linen(name):
    """Flax's NNX layers store the normalized ones before the optimizer sees a gradient."""
    kernel = RNG.normal(size=(6, 4)).astype("f")
    x, c = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((5, 6), (5, 4)))
    ours = make(jnn, name)
    ours.layer_instance.kernel[...] = jnp.asarray(kernel)
    params = {"layer_instance": {"kernel": kernel, "bias": np.zeros(4, "f")}}
    variables, extra = {"params": params}, {}
    if name == "SpectralNorm":
        u, sigma = (ours.batch_stats["kernel", part][...] for part in ("u", "sigma"))
        stats = {"layer_instance/kernel/u": u, "layer_instance/kernel/sigma": sigma}
        variables, extra = {**variables, "batch_stats": stats}, {"update_stats": False}
    else:
        params["layer_instance/kernel/scale"] = np.ones(4, "f")
    linen = getattr(nn, name)(nn.Dense(4))

    def loss(params):
        return (linen.apply({**variables, "params": params}, x, **extra) * c).sum()

    wanted = jax.grad(loss)(params)
    got = nnx.jit(nnx.grad(lambda m: (m(x) * c).sum()))(ours)
    for part in ("kernel", "bias"):
        g, w = got["layer_instance"][part][...], wanted["layer_instance"][part]
        np.testing.assert_allclose(g, w, atol=1e-5)
    if name == "WeightNorm":
        scale = got["scales"][("kernel",)][...]
        np.testing.assert_allclose(scale, wanted["layer_instance/kernel/scale"], atol=1e-5)
    np.testing.assert_array_equal(ours.layer_instance.kernel[...], kernel)


def test_train_and_eval():
    layer = make(jnn, "SpectralNorm")
    kernel = np.asarray(layer.layer_instance.kernel[...])
    layer.eval()
    u = np.asarray(layer.batch_stats["kernel", "u"][...])
    layer(X)
    np.testing.assert_array_equal(layer.batch_stats["kernel", "u"][...], u)
    layer.train()
    for _ in range(40):
        layer(X)
    sigma = np.linalg.svd(kernel, compute_uv=False)[0]
    np.testing.assert_allclose(layer.batch_stats["kernel", "sigma"][...], sigma, rtol=1e-4)
    y = layer(jnp.eye(6), update_stats=False) - layer.layer_instance.bias[...]
    np.testing.assert_allclose(y, kernel / sigma, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_inside_of_any_transformation(name):
    layer = make(jnn, name, "conv")
    run = (lambda x: layer(x, False)) if name == "SpectralNorm" else layer
    wanted = run(X)
    np.testing.assert_allclose(jax.jit(run)(X), wanted, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(run)(X), wanted, atol=1e-6)

    @nnx.vmap(in_axes=0)
    def create(key):
        rngs = nnx.Rngs(key)
        return getattr(jnn, name)(nnx.Linear(6, 4, rngs=rngs), rngs=rngs)

    many = create(jax.random.split(jax.random.key(0), 3))
    assert nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(many, X).shape == (3, *X.shape[:-1], 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrapped_layer_updates_its_statistics(name):
    layer = make(jnn, name, "block")
    layer(X)
    assert (layer.layer_instance.bn.mean[...] != 0).all()


def test_state_of_flax_loads():
    for name in NAMES:
        ours, theirs = (make(module, name, "block") for module in (jnn, nnx))
        state = stirred(nnx.state(theirs))
        nnx.update(theirs, state)
        nnx.update(ours, nnx.clone(state))
        got, wanted = (nnx.jit(lambda m: m(X))(m) for m in (ours, theirs))
        np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_scale_init_may_be_random():
    """Flax's hands it no key."""
    init = nnx.initializers.normal(1.0)
    layer = make(jnn, "WeightNorm", scale_init=init, param_dtype=jnp.bfloat16)
    scale = layer.scales[("kernel",)][...]
    assert scale.dtype == jnp.bfloat16 and len(np.unique(scale)) == 4


def test_what_is_stored_keeps_its_dtype():
    with jax.enable_x64(True):
        rngs = nnx.Rngs(0)
        layer = jnn.SpectralNorm(nnx.Linear(6, 4, param_dtype="float64", rngs=rngs), rngs=rngs)
        assert layer(jnp.ones((2, 6), "float64")).dtype == "float64"
        stats = jax.tree.leaves(nnx.state(layer, nnx.BatchStat))
        assert {a.dtype.name for a in stats} == {"float32"}
        assert layer.layer_instance.kernel[...].dtype == "float64"


def test_errors():
    for name in NAMES:
        layer = make(jnn, name)
        extra = nnx.Param(jnp.ones((2, 2)))
        layer.layer_instance.other_kernel = extra
        if name == "WeightNorm":
            layer.variable_filter = nnx.filterlib.to_predicate(
                nnx.Any(nnx.PathContains("kernel"), nnx.PathContains("other_kernel"))
            )
        with pytest.raises(ValueError, match=f"{name}: .*'other_kernel'.*has all its parameters"):
            layer(X)
    with pytest.raises(ValueError, match=r"SpectralNorm: .*\(3, 3, 6, 4\).*set it to False"):
        make(jnn, "SpectralNorm", "conv", error_on_non_matrix=True)
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="WeightNorm: feature_axes=3 is out of range"):
        jnn.WeightNorm(nnx.Linear(6, 4, rngs=rngs), feature_axes=3, rngs=rngs)
