"""Copies of NNX modules with other modules in them; the original stays as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tools.networks import NNX

from jaxnorm.models.graph import copied, with_modules


class Doubled(nnx.Module):
    def __init__(self, inner):
        self.inner = inner

    def __call__(self, x):
        return 2 * self.inner(x)


def snapshot(model):
    data = lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a  # noqa: E731
    return jax.tree.map(lambda a: np.array(data(a)), nnx.state(model)), str(nnx.graphdef(model))


def assert_as_before(model, before):
    after = snapshot(model)
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    assert after[1] == before[1]


@pytest.mark.parametrize("name", ["nnx/lists_and_dicts", "nnx/mlp", "nnx/shared_conv"])
def test_a_copy_is_the_model_with_variables_of_its_own(name):
    model = NNX[name]().model
    before = snapshot(model)
    copy = copied(model)
    assert_as_before(copy, before)
    for leaf, same in zip(jax.tree.leaves(nnx.state(copy)), jax.tree.leaves(nnx.state(model))):
        assert leaf is same  # the arrays are shared
    nnx.update(copy, jax.tree.map(jnp.zeros_like, nnx.state(copy, nnx.Param)))
    assert_as_before(model, before)


class Holders(nnx.Module):
    """Dense layers in an attribute, a list and a dict; the one in the list is in the dict too."""

    def __init__(self, rngs):
        make = lambda: nnx.Linear(3, 3, kernel_init=nnx.initializers.ones, rngs=rngs)  # noqa: E731
        self.one = make()
        self.several = nnx.List([make(), make()])
        self.named = nnx.Dict(a=make(), again=self.several[1])

    def __call__(self, x):
        for layer in (self.one, *self.several, *self.named.values()):
            x = layer(x)
        return x


X = jnp.ones((1, 3))


def test_modules_are_replaced_wherever_something_refers_to_them():
    model = Holders(nnx.Rngs(0))
    before, plain = snapshot(model), model(X)
    seen = []

    def change(path, module):
        seen.append("/".join(path))
        return Doubled(module) if isinstance(module, nnx.Linear) else None

    new = with_modules(model, change)
    # The shared layer is asked about once, and each of the five calls is doubled.
    assert sorted(seen) == [
        "",
        "named",
        "named/a",
        "named/again",
        "one",
        "several",
        "several/0",
    ] or (sorted(seen) == ["", "named", "named/a", "one", "several", "several/0", "several/1"])
    np.testing.assert_array_equal(new(X), 2**5 * plain)
    assert type(new.several) is nnx.List and type(new.named) is nnx.Dict
    assert new.several[1] is new.named["again"] and isinstance(new.one, Doubled)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x))(new, X), 2**5 * plain)
    # It can be split, and so stored, copied and trained.
    np.testing.assert_array_equal(copied(new)(X), 2**5 * plain)
    assert len(jax.tree.leaves(nnx.state(new, nnx.Param))) == 2 * 4
    new.one.inner.kernel[...] = jnp.zeros((3, 3))
    assert_as_before(model, before)
    np.testing.assert_array_equal(model(X), plain)


def test_one_layer_by_its_path_and_the_model_itself():
    model = Holders(nnx.Rngs(0))
    plain = model(X)
    new = with_modules(model, lambda path, m: Doubled(m) if path == ("several", "0") else None)
    np.testing.assert_array_equal(new(X), 2 * plain)
    whole = with_modules(model, lambda path, m: Doubled(m) if path == () else None)
    assert isinstance(whole, Doubled)  # what is within the new module is not replaced again
    np.testing.assert_array_equal(whole(X), 2 * plain)
    assert type(model) is Holders


def test_nothing_replaced_is_a_copy():
    model = Holders(nnx.Rngs(0))
    before = snapshot(model)
    same = with_modules(model, lambda path, module: module)
    assert_as_before(same, before)
    assert same is not model and same.one.kernel is not model.one.kernel


def test_a_replaced_module_is_not_searched():
    model = Holders(nnx.Rngs(0))
    seen = []

    def change(path, module):
        seen.append("/".join(path))
        return Doubled(nnx.Linear(3, 3, rngs=nnx.Rngs(1))) if path == ("one",) else None

    with_modules(with_modules(model, change), change)
    assert "one/inner" not in seen
