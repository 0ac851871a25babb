"""Selection of layers by path, class and function, and the error that names what there is."""

import pytest
from flax import linen as nn
from flax import nnx

import jaxnorm.linen as jnn
from jaxnorm.models.select import NORM_TYPES, Selection

LAYERS = [
    ("stem/norm", nn.BatchNorm()),
    ("block_0/norm", jnn.BatchNorm()),
    ("block_0/dense", nn.Dense(3)),
    ("block_0/attention/norm", nn.LayerNorm()),
    ("head", nn.Dense(2)),
]
NAMES = [name for name, _ in LAYERS]


def chosen(layers, default=NORM_TYPES):
    found = Selection.of("freeze", layers).among("freeze", "where", LAYERS, default)
    return [name for name in NAMES if name in found]


@pytest.mark.parametrize(
    "layers, expected",
    [
        (None, ["stem/norm", "block_0/norm", "block_0/attention/norm"]),
        ("*norm", ["stem/norm", "block_0/norm", "block_0/attention/norm"]),
        ("block_0/*", ["block_0/norm", "block_0/dense", "block_0/attention/norm"]),
        ("block_?/norm", ["block_0/norm"]),
        (nn.BatchNorm, ["stem/norm", "block_0/norm"]),
        (jnn.BatchNorm, ["block_0/norm"]),
        ((nn.LayerNorm, "head"), ["block_0/attention/norm", "head"]),
        (["stem/*"], ["stem/norm"]),
        (lambda path, kind: kind == "Dense" and path != "head", ["block_0/dense"]),
    ],
)
def test_what_is_selected(layers, expected):
    assert chosen(layers) == expected


def test_the_default_stands_for_none():
    assert chosen(None, nn.Dense) == ["block_0/dense", "head"]
    # A default of several classes needs one of them alone.
    assert chosen(None, (nn.LayerNorm, nn.GroupNorm)) == ["block_0/attention/norm"]


@pytest.mark.parametrize(
    "layers, shown",
    [
        ("Norm_*", "'Norm_*'"),
        (("*norm", "tail"), "'tail'"),
        (nn.GroupNorm, "flax.linen.GroupNorm"),
        (nnx.BatchNorm, "flax.nnx.BatchNorm"),
        ((nn.BatchNorm, nn.RMSNorm), "flax.linen.RMSNorm"),
        (lambda path, kind: False, "<function"),
        ((), "()"),
    ],
)
def test_a_filter_that_matches_nothing(layers, shown):
    with pytest.raises(ValueError) as error:
        chosen(layers)
    message = str(error.value)
    assert message.startswith("freeze: where must select at least one layer; got ")
    assert shown in message.split(", and the model has ")[0]
    for name, module in LAYERS:
        assert f"{name} ({type(module).__name__})" in message
    assert message.endswith("Choose among these; in a pattern, * stands for anything.")


def test_a_model_without_any():
    selection = Selection.of("freeze", None)
    with pytest.raises(ValueError, match=r"got flax\.linen\.BatchNorm, and the model has no layer"):
        selection.among("freeze", "where", [], nn.BatchNorm)


@pytest.mark.parametrize("layers", [3, [None], {"a": 1}.items()])
def test_what_is_no_selection(layers):
    with pytest.raises(TypeError, match=r"freeze: layers must be a path .* For example"):
        Selection.of("freeze", layers)
