"""Layers in the order in which an example passes through them."""

import jax
import pytest
from flax import linen as nn
from flax import nnx
from tools.networks import NETWORKS

from jaxnorm.models.layers import called_layers


def layers(name):
    network = NETWORKS[name]()
    return called_layers("test", network.model, network.variables, network.inputs)


def test_the_order_is_that_of_the_calls_and_not_of_the_definitions():
    class Backwards(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(2, 2, rngs=rngs)
            self.b = nnx.Linear(3, 2, rngs=rngs)
            self.unused = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.a(self.b(x))

    model = Backwards(nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((4, 3), "float32")
    for _ in range(2):  # a second time too, although a hook was there before
        found = called_layers("test", model, None, (x,))
        assert list(found) == [(), ("b",), ("a",)]
        assert [layer.inputs[0].shape for layer in found.values()] == [(4, 3), (4, 3), (4, 2)]


def test_a_linen_layer_comes_before_those_within_it():
    found = layers("linen/resnet")
    names = [layer.name for layer in found.values()]
    assert names == [
        "ResNet", "conv_init", "bn_init",
        "BasicBlock_0", "BasicBlock_0/Conv_0", "BasicBlock_0/BatchNorm_0",
        "BasicBlock_0/Conv_1", "BasicBlock_0/BatchNorm_1",
        "BasicBlock_1", "BasicBlock_1/Conv_0", "BasicBlock_1/BatchNorm_0",
        "BasicBlock_1/Conv_1", "BasicBlock_1/BatchNorm_1",
        "BasicBlock_1/shortcut", "BasicBlock_1/shortcut_norm", "Dense_0",
    ]  # fmt: skip
    module = found["BasicBlock_1", "BatchNorm_0"].module
    assert type(module) is nn.BatchNorm and module.parent is None
    assert module.use_running_average is True  # it is an evaluation
    assert found["bn_init",].inputs[0].shape == (2, 9, 8, 6)


@pytest.mark.parametrize(
    "name, path", [("linen/shared_norm", ("shared",)), ("nnx/shared_norm", ("norm",))]
)
def test_a_shared_layer_is_there_once_with_the_inputs_of_each_call(name, path):
    shared = layers(name)[path]
    assert len(shared.inputs) == 2
    assert {i.shape for i in shared.inputs} == {(2, 9, 8, 4)}


def test_a_second_model_of_a_class_has_layers_of_its_own():
    first, second = layers("nnx/resnet"), layers("nnx/resnet")
    assert list(first) == list(second) and len(first) == 17
    assert all(first[path].module is not second[path].module for path in first)


def test_a_model_that_does_not_take_the_example():
    model = nn.Dense(3)
    variables = {"params": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}
    with pytest.raises(TypeError, match="test: the model must accept its inputs"):
        called_layers("test", model, variables, ())
