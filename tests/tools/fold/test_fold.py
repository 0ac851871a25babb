"""Folded models give the numbers of the models that they came from."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from tools.networks import NETWORKS, cast, filled

import jaxnorm.linen as jnn
from jaxnorm import tools
from jaxnorm.models.adapt import in_evaluation
from jaxnorm.testing import assert_close

# How many layers of each network become part of others; the rest is listed with reasons.
FOLDED = {
    "linen/resnet": (6, 0), "linen/resnet_explicit": (6, 0), "linen/resnet_bottleneck": (9, 0),
    "linen/resnet_preactivation": (2, 3), "linen/norm_before_conv_same": (3, 0),
    "linen/norm_before_conv_stride": (3, 0), "linen/norm_before_conv_explicit": (3, 0),
    "linen/norm_before_conv_valid": (3, 0), "linen/densenet": (2, 4),
    "linen/efficientnet": (7, 0), "linen/unet": (5, 0), "linen/shared_conv": (0, 2),
    "linen/shared_norm": (0, 1), "linen/lists_and_dicts": (4, 0), "linen/mlp": (3, 0),
    "linen/general_maps": (3, 0), "linen/convolutions": (6, 0),
    "linen/standardized_weights": (3, 1), "linen/normed_weights": (3, 0),
    "linen/transformer": (3, 0), "linen/transformer_rms_offset": (3, 0),
    "linen/transformer_layer_scale": (5, 0), "linen/transformer_post_norm": (0, 2),
    "linen/second_readers": (0, 2), "linen/nothing_to_fold": (0, 1), "linen/stacked": (2, 1),
    "linen/by_field": (1, 0), "nnx/resnet": (6, 0), "nnx/norm_before_conv_same": (2, 0),
    "nnx/densenet": (2, 3), "nnx/unet": (4, 0), "nnx/shared_norm": (0, 1),
    "nnx/lists_and_dicts": (4, 0), "nnx/general_maps": (3, 0), "nnx/standardized_weights": (3, 1),
    "nnx/normed_weights": (3, 0), "nnx/transformer_rms_offset": (3, 0), "nnx/stacked": (2, 1),
}  # fmt: skip


def folded_of(network):
    model, variables, inputs = network
    if variables is None:
        return tools.fold(model, *inputs)
    return tools.fold(model, variables, *inputs)


def outputs(model, variables, *inputs):
    made = jax.jit(lambda v, *x: in_evaluation("test", model, v, x, {}))(variables, *inputs)
    return [np.asarray(y, np.float64) for y in jax.tree.leaves(made)]


def assert_same(network, folded, inputs, factor=1.0):
    wanted = outputs(network.model, network.variables, *inputs)
    got = outputs(folded.model, folded.variables, *inputs)
    for a, b in zip(got, wanted, strict=True):
        assert np.max(np.abs(a - b)) <= factor * folded.report.allowed * np.max(np.abs(b))


@functools.cache
def folding(name):
    network = NETWORKS[name]()
    return network, folded_of(network)


@pytest.mark.parametrize(
    "padding", ["SAME", "VALID", "CIRCULAR", "REFLECT", ((2, 0), (0, 3)), "CAUSAL"]
)
def test_a_norm_before_a_convolution_is_exact_at_the_border(padding):
    """Against NumPy: what is padded with zeros is the normalized image."""
    size = (3,) if padding == "CAUSAL" else (3, 2)
    conv = nn.Conv(4, size, strides=2, padding=padding, kernel_dilation=2, use_bias=False)
    model = nn.Sequential([nn.BatchNorm(use_running_average=True), conv])
    shape = (2, 9, 3) if padding == "CAUSAL" else (2, 9, 8, 3)
    x = jnp.asarray(np.random.default_rng(1).normal(2, 1, shape), jnp.float32)
    variables = filled(jax.eval_shape(model.init, jax.random.key(0), x), 5)
    folded = tools.fold(model, variables, x)
    assert len(folded.report.folded) == 1
    norm, stats = variables["params"]["layers_0"], variables["batch_stats"]["layers_0"]
    rstd = 1 / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    normal = (np.asarray(x, np.float64) - stats["mean"]) * rstd * norm["scale"] + norm["bias"]
    with jax.enable_x64(True):
        kernel = {"params": {"kernel": np.float64(variables["params"]["layers_1"]["kernel"])}}
        wanted = np.asarray(conv.apply(kernel, jnp.asarray(normal, jnp.float64)))
    got = folded.model.apply(folded.variables, x)
    assert_close(got, wanted, conditioning=8)


@pytest.mark.parametrize("name", FOLDED)
def test_every_norm_is_folded_or_listed(name):
    _, folded = folding(name)
    report = folded.report
    assert (len(report.folded), len(report.kept)) == FOLDED[name], str(report)
    assert report.difference <= report.allowed < 2e-5
    assert all(kept.reason for kept in report.kept)
    for row in report.folded:
        assert row.layer in str(report) and row.into in str(report)


@pytest.mark.parametrize("name", ["linen/efficientnet", "linen/unet", "nnx/norm_before_conv_same"])
def test_inputs_of_another_size(name):
    network, folded = folding(name)
    [x] = network.inputs
    size = (3, x.shape[1] + 4, x.shape[2] + 8, x.shape[3])
    other = jnp.asarray(np.random.default_rng(9).normal(0.3, 1, size), x.dtype)
    assert_same(network, folded, (other,))


@pytest.mark.parametrize("name", ["linen/efficientnet", "linen/transformer", "nnx/resnet"])
def test_bfloat16(name):
    network = cast(NETWORKS[name](), jnp.bfloat16)
    folded = folded_of(network)
    assert len(folded.report.folded) == FOLDED[name][0]
    assert_same(network, folded, network.inputs)
    before = jax.tree.leaves(network.variables or nnx.state(network.model))
    after = jax.tree.leaves(folded.variables or nnx.state(folded.model))
    assert {x.dtype for x in after} <= {x.dtype for x in before}


class Two(nn.Module):
    """A convolution without bias, and a norm."""

    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(5, (3, 2), use_bias=False, param_dtype=self.dtype)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return jnn.BatchNorm(use_running_average=not train)(x)


def two(dtype=jnp.float32):
    model, x = Two(dtype), jnp.ones((1, 4, 6, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return model, filled(shapes, 3), x


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_are_rounded_once(dtype):
    model, variables, x = two(dtype)
    folded = tools.fold(model, variables, x)
    conv, norm = variables["params"]["Conv_0"], variables["params"]["BatchNorm_0"]
    stats = variables["batch_stats"]["BatchNorm_0"]
    kernel, scale, bias, mean, var = (
        np.asarray(a, np.float64)
        for a in (conv["kernel"], norm["scale"], norm["bias"], stats["mean"], stats["var"])
    )
    factor = scale / np.sqrt(var + np.float64(np.float32(1e-5)))
    got = folded.variables["params"]["Conv_0"]
    np.testing.assert_array_equal(np.asarray(got["kernel"]), (kernel * factor).astype(dtype))
    np.testing.assert_array_equal(np.asarray(got["bias"]), (bias - mean * factor).astype(dtype))
    assert set(folded.variables) == {"params"} and set(folded.variables["params"]) == {"Conv_0"}


def test_the_model_and_its_variables_stay():
    model, variables, x = two()
    before = jax.tree.map(np.array, variables)
    tools.fold(model, variables, x)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    network = NETWORKS["nnx/resnet"]()
    state = jax.tree.map(np.array, nnx.state(network.model))
    folded_of(network)
    jax.tree.map(np.testing.assert_array_equal, state, nnx.state(network.model))


def test_what_is_added_does_not_depend_on_the_values():
    model, variables, x = two()
    first = tools.fold(model, variables, x).variables
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    second = tools.fold(model, {**variables, "params": zeros}, x).variables
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)


def test_frozen_dicts_and_boxes_stay():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            x = nn.Dense(4, kernel_init=init, use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

    model, x = Boxed(), jnp.arange(6.0).reshape(2, 3)
    variables = freeze(jax.device_get(model.init(jax.random.key(0), x)))
    folded = tools.fold(model, variables, x)
    kernel = folded.variables["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned) and kernel.names == (None, "model")
    assert type(folded.variables) is type(variables)
    assert_close(folded.model.apply(folded.variables, x), model.apply(variables, x), conditioning=8)


def test_jit_and_export():
    network, folded = folding("linen/resnet")
    run = jax.jit(lambda v, x: folded.model.apply(v, x, train=False))
    exported = jax.export.export(run)(folded.variables, *network.inputs)
    again = jax.export.deserialize(exported.serialize())
    got = again.call(folded.variables, *network.inputs)
    wanted = folded.model.apply(folded.variables, *network.inputs, train=False)
    assert_close(got, wanted, conditioning=16)
    assert "rsqrt" not in exported.mlir_module()


def test_a_folded_model_refuses_to_train():
    model, variables, x = two()
    folded = tools.fold(model, variables, x)
    with pytest.raises(ValueError, match="fold: a folded model must be called in evaluation"):
        folded.model.apply(folded.variables, x, train=True, rngs={"dropout": jax.random.key(0)})
    network, folded = folding("nnx/general_maps")
    trained = nnx.clone(folded.model)
    trained.train()
    with pytest.raises(ValueError, match="fold: a folded model must be called in evaluation"):
        trained(*network.inputs)


def test_where_selects_and_names_what_there_is():
    network, _ = folding("linen/unet")
    folded = tools.fold(network.model, network.variables, *network.inputs, where="BatchNorm_1")
    assert [row.layer for row in folded.report.folded] == ["BatchNorm_1"]
    assert {row.reason for row in folded.report.kept} == {"where= leaves it out"}
    with pytest.raises(ValueError, match=r"^fold: where .*'nowhere'.*BatchNorm_0"):
        tools.fold(network.model, network.variables, *network.inputs, where="nowhere")


def test_bad_input():
    model, variables, x = two()
    dense = nn.Dense(3)
    with pytest.raises(ValueError, match=r"^fold: the model must have a norm.*Dense.*as it is\."):
        tools.fold(dense, dense.init(jax.random.key(0), x), x)
    with pytest.raises(ValueError, match=r"^fold: the model must accept its variables.*Pass"):
        tools.fold(model, {"params": {}}, x)
    with pytest.raises(ValueError, match=r"^fold: the model must accept its variables.*Pass"):
        tools.fold(model, variables, jnp.ones((1, 4, 6, 4)))
    with pytest.raises(ValueError, match=r"^fold: a Linen module must come with its variables"):
        tools.fold(model)
    with pytest.raises(TypeError, match=r"^fold: model must be a flax"):
        tools.fold(lambda x: x, x)
    broken = jax.tree.map(lambda a: a * jnp.nan, variables)
    with pytest.raises(ValueError, match=r"^fold: a folded model must give the model's outputs"):
        tools.fold(model, broken, x)


def test_a_wrong_fold_is_not_returned(monkeypatch):
    from jaxnorm.tools.fold import linear

    def wrong(self, scale, shift, has_shift):
        self._change(self.kernel * 1.001, self.bias + shift, self.taps, has_shift)

    monkeypatch.setattr(linear.Linear, "scale_result", wrong)
    model, variables, x = two()
    with pytest.raises(ValueError, match=r"^fold: a folded model must give the model's outputs"):
        tools.fold(model, variables, x)
