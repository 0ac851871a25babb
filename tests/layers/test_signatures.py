"""Signatures of all layers: Flax's first, as the installed Flax has them, then what is added."""

import inspect
import json
import subprocess
import sys

import flax.linen
import flax.nnx
import pytest

import jaxnorm.linen
import jaxnorm.nnx

pytestmark = pytest.mark.sample

LIBRARIES = {"linen": (jaxnorm.linen, flax.linen), "nnx": (jaxnorm.nnx, flax.nnx)}
LAYERS = [(library, name) for library, (ours, _) in LIBRARIES.items() for name in ours.__all__]
KERNEL = {"weight_standardization", "use_gain", "gain_init", "weight_epsilon"}
NORM = {"activation", "implementation"}
ADDED = {
    "BatchNorm": NORM | {"unbiased", "debias", "virtual_batch_size"},
    "LayerNorm": NORM | {"scale_offset", "save"},
    "RMSNorm": NORM | {"scale_offset", "save"},
    "GroupNorm": NORM | {"scale_offset"},
    "InstanceNorm": NORM | {"scale_offset"},
    "Conv": KERNEL,
    "Dense": KERNEL,
    "Linear": KERNEL,
    "SpectralNorm": set(),
    "WeightNorm": set(),
}
IN_THE_CALL = {
    "LayerNorm": {"residual", "scale", "bias"},
    "RMSNorm": {"residual", "scale"},
    "GroupNorm": {"scale", "bias"},
    "InstanceNorm": {"scale", "bias"},
}


def parameters(layer, method: str) -> list[tuple]:
    found = inspect.signature(getattr(layer, method)).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("method", ["__init__", "__call__"])
@pytest.mark.parametrize("library, name", LAYERS)
def test_those_of_flax_then_ours_by_keyword_only(library, name, method):
    ours, theirs = (getattr(module, name) for module in LIBRARIES[library])
    assert ours.__name__ == theirs.__name__ and issubclass(ours, theirs)
    got, wanted = parameters(ours, method), parameters(theirs, method)
    assert got[: len(wanted)] == wanted
    added = got[len(wanted) :]
    assert {kind for _, kind, _ in added} <= {inspect.Parameter.KEYWORD_ONLY}
    expected = ADDED[name] if method == "__init__" else IN_THE_CALL.get(name, set())
    assert {name for name, _, _ in added} == expected


@pytest.mark.parametrize("name", sorted({*jaxnorm.linen.__all__} & {*jaxnorm.nnx.__all__}))
def test_linen_and_nnx_add_alike(name):
    defaults = []
    for module in (jaxnorm.linen, jaxnorm.nnx):
        found = parameters(getattr(module, name), "__init__")
        defaults.append({p: default for p, _, default in found if p in ADDED[name]})
    assert defaults[0] == defaults[1]


@pytest.mark.parametrize("library, name", LAYERS)
def test_every_argument_of_a_constructor_is_written_out(library, name):
    """No `*args` or `**kwargs`, of which editors know nothing; also where one asks the class."""
    layer = getattr(LIBRARIES[library][0], name)
    found = list(inspect.signature(layer).parameters.values())
    assert found == list(inspect.signature(layer.__init__).parameters.values())[1:]
    kinds = {p.kind for p in found}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}


def test_a_subclass_of_an_nnx_layer_shows_its_own_constructor():
    class Mine(jaxnorm.nnx.LayerNorm):
        def __init__(self, width: int, rngs):
            super().__init__(width, rngs=rngs)

    assert list(inspect.signature(Mine).parameters) == ["width", "rngs"]


PROGRAM = """
import jax
import jaxnorm.linen as linen
import jaxnorm.nnx as nnx
from flax.nnx import Rngs

rngs = Rngs(0)
linen.BatchNorm(momentum=None, activation=jax.nn.relu, debias=True)
linen.BatchNorm(momentun=0.9)  # wrong
linen.LayerNorm(1e-3, save="output", name="norm")
linen.LayerNorm(saved="output")  # wrong
linen.LayerNorm(save="all")  # wrong
linen.Conv(4, (3, 3), weight_standardization=True)
linen.Dense(4, weight_standardisation=True)  # wrong
linen.GroupNorm(4, num_group=2)  # wrong
linen.WeightNorm(linen.Dense(4), epsilon=1e-6)
linen.WeightNorm(linen.Dense(4), eps=1e-6)  # wrong
nnx.BatchNorm(4, momentum=None, virtual_batch_size=8, rngs=rngs)
nnx.BatchNorm(4, virtual_batch=8, rngs=rngs)  # wrong
nnx.LayerNorm(4)  # wrong
nnx.RMSNorm(4, scale_offset=1.0, rngs=rngs)(jax.numpy.ones(4), residual=jax.numpy.ones(4))
nnx.RMSNorm(4, rngs=rngs)(jax.numpy.ones(4), residuals=None)  # wrong
nnx.GroupNorm(4, 2, implementation=3, rngs=rngs)  # wrong
nnx.InstanceNorm(4, activation=jax.nn.silu, rngs=rngs)
nnx.Conv(4, 4, 3, 1, use_gain=True, weight_standardization=True, rngs=rngs)
nnx.Linear(4, 4, use_gian=True, rngs=rngs)  # wrong
nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), n_steps=2, rngs=rngs)
nnx.SpectralNorm(nnx.Linear(4, 4, rngs=rngs), steps=2, rngs=rngs)  # wrong
"""


def test_a_type_checker_reports_wrong_arguments(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    command = ["-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(file)]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=tmp_path)
    reports = json.loads(run.stdout)["generalDiagnostics"]
    found = {report["range"]["start"]["line"] for report in reports}
    wanted = {i for i, line in enumerate(PROGRAM.splitlines()) if "# wrong" in line}
    assert found == wanted, [r["message"] for r in reports]
