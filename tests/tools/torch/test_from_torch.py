"""Weights in PyTorch's layouts, written by hand in NumPy, against sums written out in NumPy."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxnorm.linen as jnn
import jaxnorm.nnx as jnx
from jaxnorm.testing import assert_close
from jaxnorm.tools import from_torch, match_torch, to_torch

RNG = np.random.default_rng(7)
W = RNG.normal(size=(4, 3)).astype(np.float32)
B = W[:, 0]


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def converted(state, model, x, **options):
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return from_torch(state, model, variables, x, show=None, **options)


def conv_of(x, w, stride, pad, groups):
    """PyTorch's convolution, (N, C, H, W) with weights (O, C / groups, H, W)."""
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    o, i, h, k = w.shape
    windows = np.lib.stride_tricks.sliding_window_view(x, (h, k), (2, 3))[:, :, ::stride, ::stride]
    windows = windows.reshape(x.shape[0], groups, i, *windows.shape[2:])
    y = np.einsum("ngiyxhk,goihk->ngoyx", windows, w.reshape(groups, o // groups, i, h, k))
    return y.reshape(x.shape[0], o, *y.shape[3:])


def transposed_of(x, w, stride, pad, more):
    """PyTorch's transposed convolution, (N, C, L) with weights (C, O, L)."""
    n, _, length = x.shape
    y = np.zeros((n, w.shape[1], (length - 1) * stride + w.shape[2] + more))
    for j in range(length):
        y[:, :, j * stride : j * stride + w.shape[2]] += np.einsum(
            "nc,cok->nok", x[:, :, j].astype(np.float64), w
        )
    return y[:, :, pad : y.shape[2] - pad]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_convolution(groups):
    w, x = draw(12, 6 // groups, 3, 3), draw(2, 7, 8, 6)
    model = nn.Conv(12, (3, 3), 2, padding=1, feature_group_count=groups, use_bias=False)
    y = model.apply(converted({"c.weight": w}, model, x), x)
    expected = conv_of(x.transpose(0, 3, 1, 2), w, 2, 1, groups).transpose(0, 2, 3, 1)
    assert_close(y, expected, np.float32, conditioning=4.0)


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_transposed_convolution(transpose_kernel):
    w, x = draw(5, 3, 4), draw(2, 7, 5)
    # lo = k - 1 - p, hi = lo + output_padding
    model = nn.ConvTranspose(
        3, (4,), (2,), padding=[(2, 3)], transpose_kernel=transpose_kernel, use_bias=False
    )
    y = model.apply(converted({"up.weight": w}, model, x), x)
    expected = transposed_of(x.transpose(0, 2, 1), w, 2, 1, 1).transpose(0, 2, 1)
    assert_close(y, expected, np.float32, conditioning=4.0)


def attention_of(x, state, heads):
    n, length, width = x.shape
    x = x.astype(np.float64)
    mixed = x @ state["a.in_proj_weight"].T + state["a.in_proj_bias"]
    q, k, v = mixed.reshape(n, length, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    logits = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width / heads)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    y = y.transpose(0, 2, 1, 3).reshape(x.shape)
    return y @ state["a.out_proj.weight"].T + state["a.out_proj.bias"]


@pytest.mark.parametrize("form", ["Linen", "NNX", "apart"])
def test_attention(form):
    x = draw(2, 5, 6)
    state = {
        "a.in_proj_weight": draw(18, 6), "a.in_proj_bias": draw(18),
        "a.out_proj.weight": draw(6, 6), "a.out_proj.bias": draw(6),
    }  # fmt: skip
    expected = attention_of(x, state, 3)
    given = state
    if form == "apart":
        given = {f"l.o_proj.{k}": state[f"a.out_proj.{k}"] for k in ("weight", "bias")}
        for name, w, b in zip(
            "qkv", np.split(state["a.in_proj_weight"], 3), np.split(state["a.in_proj_bias"], 3)
        ):
            given |= {f"l.{name}_proj.weight": w, f"l.{name}_proj.bias": b}
    if form == "NNX":
        model = nnx.MultiHeadAttention(3, 6, decode=False, rngs=nnx.Rngs(0))
        y = from_torch(state, model, show=None)(x)
    else:
        model = nn.MultiHeadDotProductAttention(3)
        y = model.apply(converted(given, model, x), x)
    assert_close(y, expected, np.float32, conditioning=4.0, floor=np.abs(expected).max())


def test_batch_norm_in_evaluation_and_the_number_of_updates():
    x = draw(4, 3)
    state = {
        "n.weight": draw(3), "n.bias": draw(3), "n.running_mean": draw(3),
        "n.running_var": RNG.uniform(0.5, 2.0, 3).astype(np.float32),
        "n.num_batches_tracked": np.int64(9),
    }  # fmt: skip
    model = nn.Sequential([jnn.BatchNorm(use_running_average=True)])
    for count in (None, 4):
        told = {} if count is None else {"n": count}
        variables = converted(state, model, x, running_var_count=told)
        var = state["n.running_var"].astype(np.float64) * (1 if count is None else (count - 1) / 4)
        expected = (x - state["n.running_mean"]) / np.sqrt(var + 1e-5)
        y = model.apply(variables, x)
        assert_close(y, expected * state["n.weight"] + state["n.bias"], np.float32)
    notes = match_torch(state, model, variables, x).notes
    assert any("4/3" in n or "1.33333" in n for n in notes) and any("epsilon" in n for n in notes)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_with_an_offset_in_flax(offset):
    w, x = draw(5), draw(3, 5)
    model = jnn.RMSNorm(scale_offset=1.0)
    y = model.apply(converted({"n.weight": w}, model, x, scale_offset={"n": offset}), x)
    rms = np.sqrt(np.mean(np.float64(x) ** 2, -1, keepdims=True) + 1e-6)
    assert_close(y, x / rms * (w + offset), np.float32)


def test_gamma_and_beta_are_a_norm_and_a_lone_gamma_is_none():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm()(x) * self.param("branch", nn.initializers.ones, (4,))

    gamma, beta, branch, x = draw(4), draw(4), draw(4), draw(2, 4)
    state = {"b.gamma": branch, "b.norm.gamma": gamma, "b.norm.beta": beta}
    variables = converted(state, Model(), x)["params"]
    np.testing.assert_array_equal(variables["branch"], branch)
    np.testing.assert_array_equal(variables["LayerNorm_0"]["scale"], gamma)
    np.testing.assert_array_equal(variables["LayerNorm_0"]["bias"], beta)


@pytest.mark.parametrize("form", ["weight_g", "original0"])
def test_weight_norm_is_resolved(form):
    v, g, x = draw(4, 3), draw(4, 1), draw(2, 3)
    names = {
        "weight_g": ("f.weight_g", "f.weight_v"),
        "original0": ("f.parametrizations.weight.original0", "f.parametrizations.weight.original1"),
    }[form]
    kernel = converted(dict(zip(names, (g, v))), nn.Dense(4, use_bias=False), x)["params"]["kernel"]
    exact = np.float64(g) * v / np.linalg.norm(np.float64(v), axis=1, keepdims=True)
    np.testing.assert_array_equal(kernel, exact.astype(np.float32).T)


def test_spectral_norm_is_resolved():
    w = draw(4, 3)
    u, s, v = np.linalg.svd(w)
    state = {"f.weight_orig": w, "f.weight_u": u[:, 0], "f.weight_v": v[0]}
    kernel = converted(state, nn.Dense(4, use_bias=False), draw(2, 3))["params"]["kernel"]
    assert_close(kernel, w.T / np.float64(s[0]), np.float32)


def test_a_norm_with_another_name_by_names():
    model, w = nn.Sequential([nn.RMSNorm()]), draw(3)
    new = converted({"n.g": w}, model, draw(2, 3), names={"n.g": "layers_0"})
    np.testing.assert_array_equal(new["params"]["layers_0"]["scale"], w)


def test_what_does_not_fit_a_dtype_is_refused():
    model = nn.Dense(4, use_bias=False, param_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"f\.weight with values up to .*e\+05 for float16"):
        converted({"f.weight": W * 1e5}, model, draw(2, 3))


def test_what_a_state_dict_does_not_tell():
    model, x = nn.Sequential([nn.Conv(4, (3, 3), 2), nn.BatchNorm(True)]), draw(1, 6, 6, 3)
    state = {"c.weight": draw(4, 3, 3, 3), "c.bias": draw(4)}
    state |= {"n.weight": draw(4), "n.bias": draw(4), "n.running_mean": draw(4)}
    state["n.running_var"] = draw(4) ** 2
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    table = str(match_torch(state, model, variables, x))
    assert "SAME with a stride is not PyTorch's padding=1: see layers_0." in table
    assert "BatchNorm 1e-05 (1)" in table and "at most 1.125 with this example" in table


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1, 1), use_bias=False)(x)
        return nn.Dense(5, use_bias=False)(x.reshape(x.shape[0], -1))


def test_dense_after_a_flattened_map():
    c, w, x = draw(3, 2, 1, 1), draw(5, 3 * 4 * 2), draw(2, 4, 2, 2)
    state = {"c.weight": c, "f.weight": w}
    with pytest.raises(ValueError, match=r"from_torch: the order of the inputs.*flattened="):
        converted(state, Flat(), x)
    y = Flat().apply(converted(state, Flat(), x, flattened={"f": (3, 4, 2)}), x)
    y_torch = conv_of(x.transpose(0, 3, 1, 2), c, 1, 0, 1).reshape(2, -1) @ np.float64(w.T)
    assert_close(y, y_torch, np.float32, conditioning=4.0)


def test_square_dense_layers_of_gpt2():
    """A square weight says nothing; its namesake and its bias do."""
    model = nn.Sequential([nn.Dense(6), nn.Dense(3), nn.Dense(3)])
    x = draw(2, 3)
    state = {}
    for name, shape in {"0.c_proj": (3, 6), "1.c_proj": (6, 3), "2.c_proj": (3, 3)}.items():
        state |= {f"{name}.weight": draw(*shape), f"{name}.bias": draw(shape[1])}
    params = converted(state, model, x)["params"]
    np.testing.assert_array_equal(params["layers_2"]["kernel"], state["2.c_proj.weight"])
    square = {"f.weight": draw(3, 3)}
    dense = nn.Dense(3, use_bias=False)
    kernel = converted(square, dense, x, conv1d=["f"])["params"]["kernel"]
    np.testing.assert_array_equal(kernel, square["f.weight"])


def test_names_skip_and_keep():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in (1, 0):  # not PyTorch's order
                x = nn.Dense(3, use_bias=False, name=f"block_{i}")(x)
            return nn.Dense(2, name="head")(x)

    x, state = draw(2, 3), {"l.1.w.weight": draw(3, 3), "l.2.w.weight": draw(3, 3)}
    state |= {"fc.weight": draw(9, 3), "fc.bias": draw(9)}
    variables = Model().init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"fc.weight \(9, 3\).*dense head \(bias \(2,\)"):
        from_torch(state, Model(), variables, x, show=None)
    new = from_torch(
        state, Model(), variables, x, show=None,
        names={"l.{i}.w": "block_{i-1}"}, skip=["fc.*"], keep=["head"],
    )["params"]  # fmt: skip
    for i in range(2):
        np.testing.assert_array_equal(new[f"block_{i}"]["kernel"], state[f"l.{i + 1}.w.weight"].T)
    assert new["head"]["kernel"] is variables["params"]["head"]["kernel"]


def test_names_that_change_the_order_are_told():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.RMSNorm()(nn.Dense(3, use_bias=False, name="short")(x))
            return y + nn.RMSNorm()(nn.Dense(3, use_bias=False, name="long")(x))

    state = {"a.weight": draw(3, 3), "n.weight": draw(3), "b.weight": draw(3, 3)}
    state["m.weight"] = draw(3)
    variables = Model().init(jax.random.key(0), x := draw(1, 3))
    named = {"a": "long", "b": "short"}
    told = match_torch(state, Model(), variables, x, names=named).notes
    assert any("the orders differ at a." in note and "name them, too" in note for note in told)
    in_order = match_torch(state, Model(), variables, x, names={"a": "short", "b": "long"}).notes
    assert not any("the orders differ" in note for note in in_order)


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (2, 3), (2, 2))(nn.Conv(3, (3, 2), (1, 2))(x))
        x = jnn.BatchNorm(use_running_average=True)(x).reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(2)(jnn.RMSNorm(scale_offset=1.0)(x))
        x = nn.Embed(4, 3)(jnp.argmax(x, -1)) * self.param("gain", nn.initializers.ones, (1, 3))
        return nn.DenseGeneral((2, 2))(x)


def filled(tree):
    return jax.tree.map(lambda a: draw(*a.shape).astype(a.dtype), tree)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_back_and_there_is_exact(dtype):
    x = draw(1, 4, 4, 2)
    variables = jax.eval_shape(Mixed().init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: draw(*a.shape).astype(dtype), variables)
    state = to_torch(Mixed(), variables, x)
    assert state["MultiHeadDotProductAttention_0.in_proj_weight"].shape == (12, 4)
    assert state["BatchNorm_0.num_batches_tracked"].dtype == np.int64
    told = {"scale_offset": {"RMSNorm_0": 1.0}}
    new = from_torch(state, Mixed(), variables, x, show=None, **told)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, new, variables)
    again = to_torch(Mixed(), new, like=match_torch(state, Mixed(), new, x, **told))
    assert list(again) == list(state)
    for name, array in state.items():
        np.testing.assert_array_equal(again[name], array)
        assert again[name].dtype == array.dtype


def test_boxes_dtypes_and_shardings_stay():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = nn.Dense(
        4, use_bias=False, param_dtype=jnp.bfloat16,
        kernel_init=nn.with_partitioning(nn.initializers.zeros, (None, "data")),
    )  # fmt: skip
    variables = model.init(jax.random.key(0), x := draw(2, 3))
    placed = jax.NamedSharding(mesh, jax.P(None, "data"))
    variables = jax.device_put(variables, placed)
    w = draw(4, 3)
    new = from_torch({"f.weight": w}, model, variables, x, show=None)["params"]["kernel"]
    assert isinstance(new, nn.Partitioned) and new.names == (None, "data")
    assert new.value.sharding == placed and new.value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(new.value, w.T.astype(jnp.bfloat16))


def test_nnx_models_are_copied_and_come_in_the_order_of_definition():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.z = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(11)])
            self.a = jnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs)

    model = Model(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    state = {f"{i}.weight": draw(3, 3) for i in range(12)}
    state |= {"n.running_mean": draw(3), "n.running_var": draw(3) ** 2}
    new = from_torch(state, model, show=None)
    np.testing.assert_array_equal(new.z.kernel[...], state["0.weight"].T)
    np.testing.assert_array_equal(new.layers[10].kernel[...], state["11.weight"].T)
    np.testing.assert_array_equal(new.a.mean[...], state["n.running_mean"])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Param))


class Told:  # what a torch.nn.Module says of itself
    def __init__(self, kind, weights, **settings):
        vars(self).update(settings)
        self.__class__ = type(kind, (Told,), {"__init__": object.__init__})
        self.weights = weights

    def state_dict(self):
        return {f"m.{k}": v for k, v in self.weights.items()}

    def named_modules(self):
        return [("m", self)]


def told_norm(**settings):
    weights = {"weight": draw(3), "bias": draw(3)}
    weights |= {"running_mean": draw(3), "running_var": draw(3) ** 2}
    return Told("_NormBase", weights, **{"eps": 1e-5, "momentum": 0.1} | settings)


def told_conv(padding, stride=(2, 2), kind="_ConvNd", **settings):
    return Told(
        kind, {"weight": draw(4, 3, 3, 3)}, kernel_size=(3, 3), stride=stride, padding=padding,
        dilation=(1, 1), groups=1, padding_mode="zeros", **settings,
    )  # fmt: skip


def test_an_epsilon_that_differs_is_an_error_and_a_momentum_is_told():
    model = nn.Sequential([nn.BatchNorm(use_running_average=True)])
    x = draw(2, 3)
    with pytest.raises(ValueError, match=r"epsilon=1e-05 here and 0.001.*Set epsilon=0.001"):
        converted(told_norm(eps=1e-3), model, x)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    notes = match_torch(told_norm(), model, variables, x).notes
    assert any("momentum=0.1 in PyTorch, here 0.9; layers_0 has 0.99" in n for n in notes)


@pytest.mark.parametrize(
    "padding, size, right", [("SAME", 8, False), ("SAME", 7, True), (1, 8, True), (0, 8, False)]
)
def test_padding_is_compared(padding, size, right):
    model, x = nn.Conv(4, (3, 3), 2, padding=padding, use_bias=False), draw(1, size, size, 3)
    theirs = told_conv((1, 1))
    if right:
        expected = conv_of(x.transpose(0, 3, 1, 2), theirs.weights["weight"], 2, 1, 1)
        y = model.apply(converted(theirs, model, x), x)
        assert_close(y, expected.transpose(0, 2, 3, 1), np.float32, conditioning=4.0)
    else:
        with pytest.raises(ValueError, match=r"Set padding=\[\(1, 1\), \(1, 1\)\]"):
            converted(theirs, model, x)
    with pytest.raises(ValueError, match=r"strides=\(2, 2\) here and \(1, 1\)"):
        converted(told_conv((1, 1), (1, 1)), model, x)
