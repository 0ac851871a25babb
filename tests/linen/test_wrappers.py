"""Linen's SpectralNorm and WeightNorm: Flax's where those are right, and where they are not."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import name_of

import jaxnorm.linen as jnn

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
X = jnp.asarray(RNG.normal(size=(4, 5, 5, 6)), jnp.float32)


class Block(nn.Module):
    """A layer to be wrapped, with submodules, and statistics of its own."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.0)(x)
        return nn.Dense(3)(nn.relu(x))


LAYERS = {
    "dense": lambda: nn.Dense(4),
    "conv": lambda: nn.Conv(4, (3, 3), feature_group_count=2),
    "block": Block,
    "norm": lambda: nn.LayerNorm(),
}
SPECTRAL = [
    {"n_steps": 3},
    {"n_steps": 0},
    {"dtype": jnp.bfloat16},
    {"collection_name": "spectral"},
]
WEIGHT = [
    {"use_scale": False},
    {"variable_filter": None},
    {"feature_axes": None},
    {"epsilon": 0.5, "dtype": jnp.bfloat16},
    {"scale_init": nn.initializers.normal(1.0), "param_dtype": jnp.bfloat16},
]

# Every layer, and every option of one of them.
SPECTRAL_CASES = [*((layer, {}) for layer in LAYERS), *(("dense", o) for o in SPECTRAL)]
WEIGHT_CASES = [
    *((layer, {}) for layer in LAYERS),
    *(("dense", options) for options in WEIGHT),
    ("block", {"variable_filter": {"kernel", "bias", "scale"}}),
]


def wrapped(module, name, layer, options):
    """A model with the wrapper in it, so that the wrapped layer has its usual name."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, **kwargs):
            return getattr(module, name)(LAYERS[layer](), **options)(x, **kwargs)

    return Net()


def both(name, layer, options, **kwargs):
    """Variables and results of our layer and of Flax's, on one input and the same variables."""
    models = [wrapped(module, name, layer, options) for module in (jnn, nn)]
    starts = [jax.jit(partial(m.init, **kwargs))(KEY, X) for m in models]
    mutable = [c for c in starts[1] if c != "params"]
    stirred = jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a) + 0.2 * RNG.normal(size=a.shape), a.dtype), starts[1]
    )
    run = partial(jax.jit, static_argnums=0)(lambda m, v: m.apply(v, X, mutable=mutable, **kwargs))
    return starts, [run(m, stirred) for m in models]


def shapes(tree):
    return jax.tree.map(lambda a: (a.shape, a.dtype), tree)


def assert_alike(starts, results, options):
    rounded = "dtype" in options
    tolerance = 4e-2 if jnp.bfloat16 in options.values() else 2e-5
    for (ours, theirs), is_start in ((starts, True), (results, False)):
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for g, w in zip(*map(jax.tree.leaves, (ours, theirs))):
            # Flax creates parameters of the dtype that it computes in.
            assert g.shape == w.shape and (g.dtype == w.dtype or (is_start and rounded))
            np.testing.assert_allclose(*(np.asarray(a, "f") for a in (g, w)), atol=tolerance)


@pytest.mark.sample
@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("layer, options", SPECTRAL_CASES, ids=name_of)
def test_spectral_norm_as_flax(layer, options, update):
    starts, results = both("SpectralNorm", layer, options, update_stats=update)
    assert_alike(starts, results, options)


@pytest.mark.sample
@pytest.mark.parametrize("layer, options", WEIGHT_CASES, ids=name_of)
def test_weight_norm_as_flax(layer, options):
    starts, results = both("WeightNorm", layer, options)
    assert_alike(starts, results, options)


def dense(name, kernel, **options):
    """Wrapper of a Dense without bias, and its variables with this kernel."""
    layer = getattr(jnn, name)(nn.Dense(kernel.shape[1], use_bias=False), **options)
    extra = {"update_stats": False} if name == "SpectralNorm" else {}
    variables = layer.init(KEY, jnp.eye(len(kernel)), **extra)
    variables["params"]["layer_instance"] = {"kernel": jnp.asarray(kernel)}
    return layer, variables


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e20])
def test_a_kernel_of_any_scale_is_normalized(size):
    """Flax's explodes below 1e-6, and leaves a large one as it is, or makes it zero."""
    kernel = (size * RNG.normal(size=(6, 4))).astype("f")
    layer, variables = dense("SpectralNorm", kernel, n_steps=50)
    y = layer.apply(variables, jnp.eye(6), update_stats=False)
    np.testing.assert_allclose(np.linalg.svd(y, compute_uv=False)[0], 1, rtol=1e-4)
    layer, variables = dense("WeightNorm", kernel, epsilon=0.0)
    y = layer.apply(variables, jnp.eye(6))
    np.testing.assert_allclose(np.linalg.norm(y, axis=0), 1, rtol=1e-6)


def test_training_approaches_the_largest_singular_value():
    kernel = RNG.normal(size=(6, 4)).astype("f")
    layer, variables = dense("SpectralNorm", kernel)
    for _ in range(40):
        _, new = layer.apply(variables, X[0, 0], update_stats=True, mutable=["batch_stats"])
        variables = {**variables, **new}
    (sigma,) = (v for k, v in variables["batch_stats"].items() if k.endswith("/sigma"))
    np.testing.assert_allclose(sigma, np.linalg.svd(kernel, compute_uv=False)[0], rtol=1e-4)


@pytest.mark.parametrize("name", ["SpectralNorm", "WeightNorm"])
def test_parameters_stay_when_everything_is_mutable(name):
    """Flax's spectral norm stores the normalized ones."""
    kernel = RNG.normal(size=(6, 4)).astype("f")
    layer, variables = dense(name, kernel)
    extra = {"update_stats": True} if name == "SpectralNorm" else {}
    _, new = layer.apply(variables, jnp.eye(6), mutable=True, **extra)
    np.testing.assert_array_equal(new["params"]["layer_instance"]["kernel"], kernel)


def test_without_update_stats_nothing_is_written():
    layer, variables = dense("SpectralNorm", RNG.normal(size=(6, 4)).astype("f"))
    _, new = layer.apply(variables, jnp.eye(6), update_stats=False, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])


def test_zeros_in_half_precision():
    """Flax gives NaN in float16, where its epsilon is zero."""
    layer, variables = dense("WeightNorm", np.zeros((6, 4), "float16"))
    assert not layer.apply(variables, jnp.eye(6, dtype=jnp.float16)).any()


@pytest.mark.parametrize("dtype, param_dtype", [("float64", "float32"), ("float32", "bfloat16")])
def test_what_is_stored_is_float32_and_stays_so(dtype, param_dtype):
    """Flax's takes over that of the kernel: a retrace, a broken donation."""
    with jax.enable_x64(dtype == "float64"):
        layer = jnn.SpectralNorm(nn.Dense(4, param_dtype=dtype), param_dtype=param_dtype)
        x = jnp.ones((2, 6), dtype)
        variables = layer.init(KEY, x, update_stats=False)
        y, new = layer.apply(variables, x, update_stats=True, mutable=["batch_stats"])
        assert y.dtype == dtype
        stats = (variables["batch_stats"], new)
        assert {a.dtype.name for a in jax.tree.leaves(stats)} == {"float32"}


def test_only_parameters_are_normalized():
    """Flax's takes running statistics for parameters too, and makes signs of a running mean."""
    variables = jnn.WeightNorm(Block(), variable_filter=None).init(KEY, X)
    names = {name for name in variables["params"] if name.endswith("/scale")}
    assert len(names) == len(jax.tree.leaves(variables["params"]["layer_instance"]))
    assert (variables["batch_stats"]["layer_instance"]["BatchNorm_0"]["var"] == 1).all()


@pytest.mark.parametrize("name", ["SpectralNorm", "WeightNorm"])
def test_a_wrapped_layer_updates_its_statistics(name):
    """Flax's weight norm does not let it."""
    extra = {"update_stats": True} if name == "SpectralNorm" else {}
    layer = getattr(jnn, name)(Block(train=True))
    variables = jax.jit(partial(layer.init, **extra))(KEY, X)
    _, new = layer.apply(variables, X, mutable=["batch_stats"], **extra)
    stats = new["batch_stats"]["layer_instance"]["BatchNorm_0"]
    kernel = variables["params"]["layer_instance"]["conv"]["kernel"]
    if name == "SpectralNorm":
        kernel = kernel / new["batch_stats"]["layer_instance/conv/kernel/sigma"]
    else:
        kernel = kernel / np.linalg.norm(np.asarray(kernel).reshape(-1, 4), axis=0)
    plain = nn.Conv(4, (3, 3)).apply({"params": {"kernel": kernel, "bias": np.zeros(4, "f")}}, X)
    np.testing.assert_allclose(stats["mean"], plain.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stats["var"], plain.var((0, 1, 2)), rtol=1e-4)


def test_partitioned_parameters():
    """Flax's spectral norm fails on parameters that carry names of axes."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = jnn.SpectralNorm(nn.Dense(4, kernel_init=init))
    variables = layer.init(KEY, X, update_stats=False)
    results = [layer.apply(v, X, update_stats=False) for v in (variables, nn.meta.unbox(variables))]
    np.testing.assert_allclose(*results, atol=1e-6)
    results = []
    for module in (jnn, nn):
        layer = module.WeightNorm(nn.Dense(4, kernel_init=init))
        results.append(layer.init_with_output(KEY, X)[0])
    np.testing.assert_allclose(*results, atol=1e-6)


def test_errors():
    conv = jnn.SpectralNorm(nn.Conv(4, (3, 3)), error_on_non_matrix=True)
    with pytest.raises(ValueError, match=r"SpectralNorm: .*\(3, 3, 6, 4\).*set it to False"):
        conv.init(KEY, X, update_stats=False)
    kernel = jnp.ones((6, 4), jnp.complex64)
    layer, variables = dense("SpectralNorm", kernel)
    with pytest.raises(TypeError, match=r"SpectralNorm: .*complex64.*param_dtype=jnp.complex64"):
        layer.apply(variables, jnp.eye(6), update_stats=False)
    with pytest.raises(ValueError, match="WeightNorm: feature_axes=3 is out of range"):
        jnn.WeightNorm(nn.Dense(4), feature_axes=3).init(KEY, X)
    with pytest.raises(ValueError, match="WeightNorm: epsilon must be at least 0"):
        jnn.WeightNorm(nn.Dense(4), epsilon=-1.0).init(KEY, X)
