"""Hooks on the calls of layers: each call once, at its path, in a model that computes the same."""

from collections import Counter
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tools.networks import LINEN, NNX

from jaxnorm.models.adapt import in_evaluation
from jaxnorm.models.calls import hooked, hooked_copy, rewritten

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)), jnp.float32)


@dataclass(frozen=True)
class Times:
    """A hook that multiplies what dense layers return."""

    times: float

    def __call__(self, call, path, module, args, kwargs):
        y = call(*args, **kwargs)
        return y * self.times if isinstance(module, nnx.Linear) else y


@dataclass(eq=False)
class Noting:
    """A hook that notes calls, and multiplies what dense layers return if it is asked to."""

    times: float | None = None
    calls: list = field(default_factory=list)

    def __call__(self, call, path, module, args, kwargs):
        self.calls.append((path, module))
        y = call(*args, **kwargs)
        dense = type(module).__name__ in ("Dense", "Linear")
        return y * self.times if dense and self.times is not None else y

    @property
    def paths(self):
        return ["/".join(path) for path, _ in self.calls]


def program(model, network):
    """The text of the program that evaluates a model."""
    run = lambda v, *args: in_evaluation("test", model, v, args, {})  # noqa: E731
    return str(jax.make_jaxpr(run)(network.variables, *network.inputs))


def assert_same_program(hooking, network):
    assert type(hooking).__name__ == type(network.model).__name__
    assert program(hooking, network) == program(network.model, network)


def modules_with_parameters(tree, path=()):
    """Paths of the modules that own an array of the collection."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from modules_with_parameters(value, (*path, name))
        else:
            yield path


@pytest.mark.parametrize("name", LINEN)
def test_every_linen_layer_is_hooked_at_its_path(name):
    network = LINEN[name]()
    owned = []

    class Owning(Noting):
        def __call__(self, call, path, module, args, kwargs):
            y = super().__call__(call, path, module, args, kwargs)
            owned.append((path, jax.tree.map(jnp.shape, module.variables.get("params", {}))))
            return y

    noting = Owning()
    assert_same_program(rewritten(network.model, noting), network)
    params = network.variables["params"]
    called = Counter(path for path, _ in noting.calls)
    missing = set(modules_with_parameters(params)) - set(called)
    assert not {path for path in missing if path[-1:] != ("layer_instance",)}
    for path, found in owned:
        at = params
        for part in path:
            at = at.get(part, {})
        if "scan" not in path:  # inside it a layer sees one slice
            assert jax.tree.map(jnp.shape, at) == found, path
    again = {"/".join(path) for path, count in called.items() if count > 1}
    again = {path for path in again if not path.startswith("scan")}  # Flax traces its body twice
    assert again == ({"shared"} if "shared" in name else set())


@pytest.mark.parametrize("name", NNX)
def test_every_nnx_layer_is_hooked_at_its_path(name):
    network = NNX[name]()
    noting = Noting()
    assert_same_program(hooked_copy(network.model, noting), network)
    callable_modules = {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(network.model)
        if "__call__" in dir(type(module))
    }
    called = Counter(path for path, _ in noting.calls)
    missing = set(callable_modules) - set(called)
    assert not {path for path in missing if not path or path[-1] != "layer_instance"}
    for path, module in noting.calls:
        assert type(module).__name__ == type(callable_modules[path]).__name__
        assert isinstance(module, type(callable_modules[path]))
    again = {"/".join(path) for path, count in called.items() if count > 1}
    assert again == {"nnx/shared_conv": {"first"}, "nnx/shared_norm": {"norm"}}.get(name, set())


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="dense")(x)


Compiled = nn.jit(Inner)  # one class, which JAX knows again


class Outer(nn.Module):
    """Compiled, rematerialized and repeated parts, and a method beside the call."""

    inner: nn.Module | None = None

    def setup(self):
        self.compiled = Compiled()
        self.saved = nn.remat(Inner)()
        self.repeated = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_broadcast="params",
            split_rngs={"params": False}, length=2,
        )  # fmt: skip
        self.own = self.inner or Inner()
        self.body = Inner()

    def __call__(self, x):
        return self.tail(self.saved(self.compiled(x)))

    def tail(self, x):
        return self.own(self.repeated(self.body, x, None)[0])


PARTS = ("compiled", "saved", "body", "own")


def affine(seed, parts):
    """Variables of dense layers within these parts."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"params": {p: {"dense": {"kernel": draw(3, 3), "bias": draw(3)}} for p in parts}}


def expected(variables, x, parts, times=1.0):
    """The same in NumPy, float64."""
    x = np.asarray(x, np.float64)
    for part in parts:
        layer = variables["params"][part]["dense"]
        x = (x @ np.asarray(layer["kernel"], np.float64) + layer["bias"]) * times
    return x


CALLS = ("compiled", "saved", "body", "body", "own")


@pytest.mark.parametrize("times", [2.0, -1.0])
def test_parts_that_linen_transforms_are_hooked_even_if_they_were_traced_before(times):
    model, variables = Outer(), affine(0, PARTS)
    before = model.apply(variables, X)
    np.testing.assert_allclose(before, expected(variables, X, CALLS), rtol=2e-5, atol=1e-4)
    noting = Noting(times=times)
    found = rewritten(model, noting).apply(variables, X)
    np.testing.assert_allclose(found, expected(variables, X, CALLS, times), rtol=2e-5, atol=2e-4)
    assert [p for p in dict.fromkeys(noting.paths) if p.endswith("dense")] == [
        f"{part}/dense" for part in PARTS
    ]
    np.testing.assert_array_equal(model.apply(variables, X), before)


def test_a_method_beside_the_call_is_hooked():
    variables, noting = affine(0, PARTS), Noting(times=3.0)
    model = rewritten(Outer(), noting)
    found = model.apply(variables, X, method="tail")
    wanted = expected(variables, X, ("body", "body", "own"), 3.0)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-4)
    assert "compiled/dense" not in noting.paths and "" not in noting.paths


def test_a_rewritten_module_within_another_model():
    variables, noting = affine(0, PARTS), Noting(times=2.0)
    inner = rewritten(Inner(), noting)
    found = Outer(inner).apply({"params": {**variables["params"]}} | _moved(variables), X)
    parts = CALLS[:-1]
    x = expected(variables, X, parts)
    wanted = expected(variables, x, ("own",), 2.0)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-4)
    # The paths are those within the rewritten module, and nothing beside it is hooked.
    assert noting.paths == ["", "dense"]


def _moved(variables):
    """Variables of a model whose part `own` is a field named `inner`."""
    params = dict(variables["params"])
    return {"params": {**params, "inner": params.pop("own")}}


def test_a_context_hooks_what_is_traced_within_it_alone():
    variables, noting = affine(0, PARTS), Noting(times=2.0)
    with hooked(noting):
        inside = Outer().apply(variables, X)
    seen = len(noting.calls)
    np.testing.assert_allclose(inside, expected(variables, X, CALLS, 2.0), rtol=2e-5, atol=2e-4)
    outside = Outer().apply(variables, X)
    np.testing.assert_allclose(outside, expected(variables, X, CALLS), rtol=2e-5, atol=1e-4)
    assert len(noting.calls) == seen


class Repeated(nnx.Module):
    """A layer that is compiled, rematerialized, and repeated; it is told no mode."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = nnx.jit(lambda layer, x: layer(x))(self.layers[0], x)
        return nnx.remat(lambda layer, x: layer(x))(self.layers[1], x)


def test_an_nnx_copy_shares_nothing_that_can_be_written():
    model = Repeated(nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    plain = model(X)
    noting = Noting(times=2.0)
    copy = hooked_copy(model, noting)
    np.testing.assert_allclose(copy(X), 4 * plain, rtol=1e-5)  # biases are zero
    assert noting.paths == ["", "layers/0", "layers/1"]
    copy.layers[0].kernel[...] = jnp.zeros((3, 3))
    np.testing.assert_array_equal(model(X), plain)
    assert type(model.layers[0]) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


def test_equal_hooks_compile_once(compilations):
    model = Repeated(nnx.Rngs(0))
    run = nnx.jit(lambda m, x: m(x))
    run(hooked_copy(model, Times(2.0)), X)
    seen = len(compilations)
    run(hooked_copy(model, Times(2.0)), X)
    assert len(compilations) == seen
    run(hooked_copy(model, Times(3.0)), X)
    assert len(compilations) > seen
