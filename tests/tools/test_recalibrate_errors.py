"""Bad input of `recalibrate` and `adapt`: three-part messages, and nothing is returned."""

import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from tools.drifting import ResNet, batches

from jaxnorm.tools import adapt, recalibrate

DATA = batches(shape=(3,))
NORM = nn.BatchNorm(use_running_average=True)


@pytest.fixture(scope="module")
def variables():
    return NORM.init(jax.random.key(0), DATA[0])


class Two(nn.Module):
    """A norm, and another that sees infinities where an input is large."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=True, name="first")(x)
        return nn.BatchNorm(use_running_average=True, name="second")(1 / (x[:, :1] < 99))


class Broadcast(nn.Module):
    @nn.compact
    def __call__(self, x):
        def step(norm, x, _):
            return norm(x), None

        norm = nn.BatchNorm(use_running_average=True, name="norm")
        constant = {"variable_broadcast": ("params", "batch_stats")}
        scan = nn.scan(step, **constant, split_rngs={"params": False}, length=2)
        return scan(norm, x, None)[0]


def spoiled(number, value=np.nan):
    data = [x.copy() for x in DATA]
    data[number][2, 1] = value
    return data


@pytest.mark.parametrize(
    ("batches", "options", "kind", "words"),
    [
        ([], {}, ValueError, ["at least one batch", "list", "read before"]),
        (3, {}, TypeError, ["iterable of batches", "got int"]),
        ({"x": DATA[0]}, {}, TypeError, ["iterable of batches", "got dict"]),
        (iter(DATA), {"sequential": True}, TypeError, ["list_iterator", "read once"]),
        ([*DATA, DATA[0][:, :2]], {}, ValueError, ["batch 3", "float32(7, 2)"]),
        ([DATA[0][:, :2]], {}, ValueError, ["batch 0", "float32(7, 2)"]),
        ([*DATA, {"y": DATA[0]}], {}, ValueError, ['batch["x"]', "'y'"]),
        (spoiled(1), {}, ValueError, ["batch 1 (", "the norm", "1 of 3 channels"]),
        (spoiled(2, np.inf), {"sequential": True}, ValueError, ["batch 2 (", "finite"]),
        (spoiled(0, 1e30), {}, ValueError, ["batch 0 (", "squares"]),
        (DATA, {"num_batches": 0}, ValueError, ["num_batches", "got 0"]),
        (DATA, {"layers": "nothing/*"}, ValueError, ["'nothing/*'", "BatchNorm"]),
        (DATA, {"layers": 3}, TypeError, ["layers", "got 3"]),
        (DATA, {"progress": 3}, TypeError, ["progress", "got 3"]),
        (DATA, {"layout": 3}, TypeError, ["layout", "int"]),
    ],
)
def test_refused(variables, batches, options, kind, words):
    before = jax.tree.map(np.array, variables)
    function = adapt if options else recalibrate
    with pytest.raises(kind) as error:
        function(NORM, variables, batches, **options)
    message = str(error.value)
    assert message.startswith(f"{function.__name__}: ") and message.endswith(".")
    assert all(word in message for word in words), message
    for a, b in zip(*map(jax.tree.leaves, (before, variables))):
        np.testing.assert_array_equal(a, b)


def test_the_layer_that_is_not_finite_is_named():
    variables = Two().init(jax.random.key(0), DATA[0])
    data = [x.copy() for x in DATA]
    data[1][0, 0] = 1e4
    with pytest.raises(ValueError, match=r"got batch 1 .* input of second is not, in 1 of 1"):
        recalibrate(Two(), variables, data, sequential=False, num_batches=2, layers="second")


@pytest.mark.parametrize("weight", [-1, np.nan, np.inf, "much"])
def test_weights_of_the_source(variables, weight):
    with pytest.raises(ValueError, match=r"^adapt: source_weight must .* got "):
        adapt(NORM, variables, DATA, source_weight=weight)


def test_models_and_variables(variables):
    with pytest.raises(ValueError, match=r"^recalibrate: layers must .*Dense.*\.$"):
        recalibrate(nn.Dense(2), nn.Dense(2).init(jax.random.key(0), DATA[0]), DATA)
    with pytest.raises(
        TypeError, match=r"got BatchNorm and 1 further.*\(model, variables, batches"
    ):
        recalibrate(NORM, DATA)
    with pytest.raises(TypeError, match=r"and 2 further .*\(model, batches\)"):
        recalibrate(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), variables, DATA)
    with pytest.raises(TypeError, match=r"must be its collections; got list"):
        recalibrate(NORM, DATA, DATA)
    with pytest.raises(TypeError, match=r"model must be .* got function"):
        recalibrate(lambda x: x, DATA)
    with pytest.raises(ValueError, match=r"^recalibrate: .*running statistics.*"):
        recalibrate(NORM, {"params": variables["params"]}, DATA)
    with pytest.raises(ValueError, match=r"^recalibrate: .*batch 0.*variables of this model"):
        recalibrate(ResNet(), variables, batches())
    with pytest.raises(TypeError, match=r"^recalibrate: the model must accept .*batch 0, counted"):
        recalibrate(NORM, variables, DATA, inputs=lambda x: {"y": x})
    stack = Broadcast()
    with pytest.raises(ValueError, match=r"^recalibrate: .*broadcasted variable has .*\.$"):
        recalibrate(stack, stack.init(jax.random.key(0), DATA[0]), DATA)


def test_a_bar_needs_rich(variables, monkeypatch, capsys):
    new = recalibrate(NORM, variables, DATA, progress=True)
    assert "3/3" in capsys.readouterr().out and new.report.batches == 3
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"^recalibrate: progress=True .* pip install rich"):
        recalibrate(NORM, variables, DATA, progress=True)


def test_num_batches(variables):
    done = []
    new = recalibrate(
        NORM, variables, iter(DATA), num_batches=2, progress=lambda *a: done.append(a)
    )
    assert new.report.examples == 14 and done == [(1, 2), (2, 2)]
    more = recalibrate(NORM, variables, DATA, num_batches=99, progress=lambda *a: done.append(a))
    assert more.report.examples == 17 and done[-1] == (3, 3)


def test_one_program_for_each_shape(variables, compilations):
    recalibrate(NORM, variables, DATA[:1])
    first = len(compilations)
    recalibrate(NORM, variables, [DATA[0]] * 5)
    assert len(compilations) - first <= first
