"""Where models are odd: branches, loops that hide what is in them, no norm, NaN."""

import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import initial
from flax import nnx
from jax import lax
from launching import NO_BACKEND

import jaxnorm.linen as jnn
from jaxnorm.monitor import Summary, attach, observe
from jaxnorm.monitor.probe.marks import Place, mark

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def test_importing_starts_no_backend_and_loads_nothing_to_draw_with():
    # Processes of one run find each other before it starts.
    code = (
        "import sys, jaxnorm.monitor\n"
        "heavy = {'altair', 'vl_convert', 'jinja2', 'jaxnorm.report'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code + NO_BACKEND], check=True)


def watched(module, x, **options):
    run = observe(lambda v, x: attach(module).apply(v, x, **options))
    return jax.jit(run)(initial(module, x), x)


def test_a_branch_that_is_not_taken_shows_no_element():
    norm, variables = attach(nn.LayerNorm()), initial(nn.LayerNorm(), X)

    @jax.jit
    @observe
    def run(taken, x):
        return lax.cond(taken, lambda x: norm.apply(variables, x), lambda x: 2 * x, x)

    normalized = (X - X.mean(1, keepdims=True)) / np.sqrt(X.var(1, keepdims=True) + 1e-6)
    for taken, expected, size, ends in (
        (False, 2 * X, 0, (np.inf, -np.inf)),
        (True, normalized, X.size, (X.min(), X.max())),
    ):
        y, seen = run(taken, X)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        value = seen["LayerNorm:input"].value
        assert value.moments.count == value.size == size
        np.testing.assert_allclose((value.minimum, value.maximum), ends)


def test_a_while_loop_is_refused_with_the_layers_name():
    norm, variables = attach(nn.LayerNorm()), initial(nn.LayerNorm(), X)

    def run(x):
        return lax.while_loop(lambda x: x.sum() < 0, lambda x: norm.apply(variables, x), x)

    with pytest.raises(ValueError, match=r"^observe: .* inside of 'while'.* got LayerNorm\. "):
        observe(run)(X)


def test_no_mark_at_all_is_refused():
    with pytest.raises(ValueError, match=r"^observe: a program must have marks"):
        observe(jnp.sin)(X)
    with pytest.raises(ValueError, match=r"a model that has .*Dense"):
        watched(nn.Dense(2), X)
    with pytest.raises(TypeError, match=r"^attach: model must be"):
        attach(jnp.sin)


def test_a_model_without_normalization_shows_its_nonlinearities():
    _, seen = watched(nn.Sequential([nn.Dense(6), jnp.tanh, nn.Dense(6), nn.sigmoid]), X)
    assert [name for name in seen if name.endswith("input")] == ["tanh_0:input", "sigmoid_0:input"]


@pytest.mark.sample
def test_nonlinearities_are_found_however_they_are_written():
    functions = [
        jax.nn.relu, jax.nn.gelu, lambda x: jax.nn.gelu(x, approximate=False), jax.nn.silu,
        jnp.tanh, jax.nn.sigmoid, jax.nn.leaky_relu, jax.nn.elu, jax.nn.softplus, jax.nn.mish,
        jax.nn.relu6, jax.nn.selu, jax.nn.celu, jax.nn.hard_silu, jax.nn.hard_tanh,
        jax.nn.soft_sign, jax.nn.log_sigmoid, lambda x: jnp.maximum(x, 0),
    ]  # fmt: skip
    names = ["relu", "gelu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "softplus",
             "mish", "relu6", "selu", "celu", "hard_silu", "hard_tanh", "soft_sign", "log_sigmoid",
             "relu"]  # fmt: skip
    layers = [layer for f in functions for layer in (f, nn.LayerNorm())]
    model = nn.Sequential(layers)
    variables = initial(model, X)
    y, seen = jax.jit(observe(attach(model).apply))(variables, X)
    found = [name for name in seen if "layers" not in name]
    assert [name.rsplit("_", 1)[0] for name in found[::2]] == names

    @jax.jit
    def by_hand(params, x):
        moments = []
        for function, layer in zip(functions, sorted(params, key=_number)):
            x = function(x)
            moments.append((x.mean(), x.var()))
            x = nn.LayerNorm().apply({"params": params[layer]}, x)
        return x, moments

    x, moments = by_hand(variables["params"], X)
    near = {"rtol": 1e-4, "atol": 1e-5}
    for name, (mean, var) in zip(found[1::2], moments, strict=True):
        np.testing.assert_allclose(seen[name].value.moments.mean, mean, **near)
        np.testing.assert_allclose(seen[name].value.moments.var, var, **near)
    np.testing.assert_allclose(x, y, **near)


def _number(name):
    return int(name.rsplit("_", 1)[1])


def test_softmax_is_none_and_nothing_inside_a_norm_is():
    class MyNorm(nn.BatchNorm):
        """Clamps its variance at zero."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = MyNorm(use_running_average=False)(x)
            return nn.softmax(jnn.LayerNorm()(x))

    _, seen = watched(Net(), X, mutable=["batch_stats"])
    assert {name.split("_")[0] for name in seen} == {"MyNorm", "LayerNorm"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_numbers_are_summed_in_float32(dtype):
    x = (100 + np.tile(X, (64, 1))).astype(dtype)
    _, seen = watched(nn.LayerNorm(), x)
    exact = x.astype(np.float64)
    value = seen["LayerNorm:input"].value
    assert value.moments.mean.dtype == jnp.float32
    np.testing.assert_allclose(value.moments.mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(value.moments.var, exact.var(), rtol=1e-4)


def test_what_is_not_finite_is_counted():
    x = X.copy()
    x[0, 0], x[1, 1] = np.nan, np.inf
    _, seen = watched(nn.LayerNorm(), x)
    value = seen["LayerNorm:input"].value
    np.testing.assert_allclose(value.nonfinite, 2 / X.size)
    assert value.histogram.sum() == X.size - 1  # an infinity has a bin, a NaN has none


def test_a_residual_and_a_sum_are_seen():
    _, seen = watched(jnn.RMSNorm(), X)
    run = jax.jit(observe(lambda v, x: attach(jnn.RMSNorm()).apply(v, x, residual=x)))
    (y, total), with_sum = run(initial(jnn.RMSNorm(), X), X)
    np.testing.assert_allclose(total, 2 * X)
    size = np.sqrt(np.square(2 * X).mean(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, 2 * X / size, rtol=1e-5)
    for found in (seen, with_sum):
        np.testing.assert_allclose(found["RMSNorm:output"].value.moments.mean, y.mean(), atol=1e-3)


def test_a_shared_layer_is_a_place_for_each_call():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.LayerNorm(name="norm")
            return norm(jnp.tanh(norm(x)) + x)

    _, seen = watched(Shared(), X)
    assert [name for name in seen if "tanh" not in name] == [
        "norm:input", "norm:output", "norm(2):input", "norm(2):output"
    ]  # fmt: skip


def test_layers_in_an_nnx_scan_are_places_of_their_own():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.dense = nnx.Linear(6, 6, rngs=rngs)

        def __call__(self, x):
            return x + nnx.gelu(self.dense(self.norm(x)))

    class Stack(nnx.Module):
        def __init__(self, rngs):
            make = nnx.vmap(Layer, in_axes=0, out_axes=0)
            self.layers = make(nnx.Rngs(jax.random.split(rngs(), 3)))

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model = attach(nnx.jit(lambda: Stack(nnx.Rngs(0)))())
    graph, state = nnx.split(model)
    _, seen = jax.jit(observe(lambda state, x: nnx.merge(graph, state)(x)))(state, X)
    inputs = [name for name in seen if "norm" in name and name.endswith("input")]
    assert len(inputs) == 3 and all(f"[{i}]" in name for i, name in enumerate(inputs))
    np.testing.assert_allclose(seen[inputs[0]].value.moments.mean, X.mean(), rtol=1e-5)
    assert seen[inputs[1]].value.norm > seen[inputs[0]].value.norm


def test_a_mark_is_nothing_to_any_transformation():
    place = Place("here", "LayerNorm", "input")
    f = lambda x: (mark(x, place) ** 3).sum()  # noqa: E731
    plain = lambda x: (x**3).sum()  # noqa: E731

    def transformed(f):
        slope = jax.grad(f)
        return lambda x: (
            [t(x[0]) for t in (f, slope, jax.hessian(f), jax.jacfwd(slope))], jax.vmap(f, 1)(x)
        )  # fmt: skip

    marked, unmarked = jax.jit(transformed(f))(X), jax.jit(transformed(plain))(X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), marked, unmarked)
    np.testing.assert_array_equal(mark(X, place), X)  # where nothing is compiled
    assert "custom_call" not in jax.jit(f).lower(X).as_text()


def test_summaries_are_a_monoid():
    places = [Place(f"{i}", "LayerNorm", "input", order=i) for i in range(3)]
    parts = [X[:1], X[1:3], X[3:]]

    def run(*parts):
        return sum(mark(part, place).sum() for part, place in zip(parts, places))

    pooled = jax.jit(lambda *parts: observe(run)(*parts)[1].values.pooled())(*parts)
    _, whole = jax.jit(observe(lambda x: mark(x, places[0])))(X)
    expected = whole["0:input"].value
    assert isinstance(pooled, Summary)
    for name in ("size", "minimum", "maximum", "nonfinite", "zeros", "histogram"):
        np.testing.assert_allclose(getattr(pooled, name), getattr(expected, name), rtol=1e-6)
    np.testing.assert_allclose(pooled.moments.mean, expected.moments.mean, rtol=1e-5)
    np.testing.assert_allclose(pooled.moments.var, expected.moments.var, rtol=1e-5)


def test_enough_rows_of_a_wide_layer_are_sampled():
    """With few, units that are zero half of the time look dead, and variances are wild."""
    x = np.random.default_rng(0).normal(size=(512, 4096)).astype(np.float32)
    model = nn.Sequential([nn.BatchNorm(use_running_average=False), nn.relu])

    def run(variables, x):
        return attach(model).apply(variables, x, mutable=["batch_stats"])

    _, seen = jax.jit(observe(run, elements=4096))(initial(model, x), x)
    assert seen["relu_0:output"].value.dead == 0
    moments = seen["layers_0:input"].batch.moments
    assert moments.count.min() >= 64
    np.testing.assert_allclose(moments.var.mean(), 1, atol=0.02)
