"""Commands on trained networks: files in, files out, and input that cannot be used.

The tools that compute are replaced by small ones here: they have tests of their own.
"""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from tools.networks import filled

from jaxnorm import cli, tools
from jaxnorm.tools.checkpoints import flat_arrays, read_arrays, save_tree

MODULE = """
import numpy as np
from flax import linen as nn, nnx

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4)(x)
        return nn.BatchNorm(use_running_average=not train)(x)

class Graph(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.linear(x))

instance = Net()
number = 3

def factory():
    return Net()

def needing(features, depth=1):
    return Net()

class Picky(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x) + np.ones((2, 5))

picky = Picky()

def failing():
    raise RuntimeError("no weights here")

def wrong():
    return 5

class kinds:
    graph = Graph

def batches():
    for size in (3, 2):
        yield np.full((size, 3), size, np.float32), np.zeros(size)

batch_list = [np.ones((2, 3), np.float32)]
used_up = iter(batch_list)
nothing = []
"""
X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module, and checkpoints of both its models."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"{name}_broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace: dict[str, Any] = {"__name__": name}
    exec(MODULE, namespace)
    shapes = jax.eval_shape(lambda: namespace["Net"]().init(jax.random.key(0), X))
    variables = filled(shapes, 0)
    save_tree("test", "linen", variables)
    if importlib.util.find_spec("safetensors"):
        save_tree("test", "linen.safetensors", variables)
    state = filled(nnx.state(nnx.eval_shape(lambda: namespace["Graph"](nnx.Rngs(0)))), 1)
    save_tree("test", "graph", state)
    np.savez("data.npz", x=X, y=np.zeros(5))
    np.save("data.npy", X)
    yield SimpleNamespace(name=name, variables=variables, state=state, path=tmp_path)
    for each in [each for each in sys.modules if each.startswith(name)]:
        del sys.modules[each]


class Fakes:
    """Tools that change variables in ways that a test knows, and note what they were given."""

    def __init__(self):
        self.calls: list[Any] = []

    def fold(self, model, *args):
        self.calls.append((model, args))
        if isinstance(model, nn.Module):
            return result(model, jax.tree.map(lambda a: 2 * a, args[0]))
        copy = nnx.clone(model)
        copy.norm = nnx.Linear(4, 4, rngs=nnx.Rngs(0))  # another structure
        return result(copy, None)

    def recalibrate(self, model, *args, **options):
        *variables, batches = args
        passes = [[options["inputs"](b) if options["inputs"] else b for b in batches] for _ in "ab"]
        self.calls.append((model, variables, passes, options))
        return result(model, jax.tree.map(lambda a: a + 1, variables[0]) if variables else None)

    def from_torch(self, source, model, *args, **options):
        self.calls.append((source, model, args, options))
        print("linear.weight -> kernel")
        if isinstance(model, nn.Module):
            return jax.tree.map(lambda a: a + 5, args[0])
        return nnx.clone(model)

    def match_torch(self, source, model, *args, **options):
        return source, args, options

    def to_torch(self, model, *args, like=None):
        self.calls.append((model, args, like))
        variables = args[0] if isinstance(model, nn.Module) else None
        bias = variables["params"]["Dense_0"]["bias"] if variables else model.linear.bias[...]
        return {"linear.bias": np.asarray(bias), "half.a/b": np.ones((2, 2), jnp.bfloat16).T}


def result(model, variables):
    return SimpleNamespace(model=model, variables=variables, report="the report")


@pytest.fixture
def fakes(monkeypatch):
    fakes = Fakes()
    for name in ("fold", "recalibrate", "from_torch", "match_torch", "to_torch"):
        monkeypatch.setattr(tools, name, getattr(fakes, name), raising=False)
    return fakes


def run(capsys, command, *arguments):
    assert cli.main([*command.split(), *map(str, arguments)]) == 0
    printed = capsys.readouterr().out
    assert "Traceback" not in printed
    return printed


def assert_holds(path, tree, change=lambda a: a):
    """A checkpoint holds the changed arrays of a tree."""
    wanted, found = flat_arrays(tree), read_arrays("test", path)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], change(array))


@pytest.mark.parametrize("source", ["linen", "linen.safetensors"])
@pytest.mark.parametrize("out", ["new/folded", "folded.safetensors"])
def test_fold_linen(source, out, here, fakes, capsys):
    if "safetensors" in source + out:
        pytest.importorskip("safetensors", reason="the package safetensors")
    name = f"{here.name}:factory"
    printed = run(capsys, f"fold {source} --model {name} --input 2,3:float32 --out {out}")
    assert printed == f"the report\nWritten: {out}\n"
    model, (variables, x) = fakes.calls[0]
    assert type(model).__name__ == "Net" and x.shape == (2, 3) and x.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, variables, here.variables)
    assert_holds(out, here.variables, lambda a: 2 * a)


def test_fold_nnx_and_export(here, fakes, capsys):
    command = f"fold graph --model {here.name}:kinds.graph --input data.npy --out f --export f.hlo"
    printed = run(capsys, f"{command} --platforms cpu,tpu")
    assert printed.endswith("Written: f\nWritten: f.hlo\n")
    model, (x,) = fakes.calls[0]
    np.testing.assert_array_equal(x, X)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), here.state)
    folded = fakes.fold(model).model
    assert_holds("f", nnx.state(folded))
    program = jax.export.deserialize(bytearray((here.path / "f.hlo").read_bytes()))
    assert program.platforms == ("cpu", "tpu")
    np.testing.assert_allclose(program.call(X), folded(X), rtol=1e-5, atol=1e-5)


def test_export_of_linen_is_an_evaluation(here, fakes, capsys):
    run(capsys, f"fold linen --model {here.name}:instance --input 5,3 --out f --export f.hlo")
    program = jax.export.deserialize(bytearray((here.path / "f.hlo").read_bytes()))
    double = jax.tree.map(lambda a: 2 * np.asarray(a, np.float64), here.variables)
    dense, norm = double["params"]["Dense_0"], double["params"]["BatchNorm_0"]
    stats = double["batch_stats"]["BatchNorm_0"]
    y = (X @ dense["kernel"] + dense["bias"] - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(
        program.call(X), y * norm["scale"] + norm["bias"], rtol=1e-4, atol=1e-5
    )


def test_a_dry_run_writes_nothing(here, fakes, capsys):
    before = sorted(here.path.iterdir())
    name = f"--model {here.name}:factory"
    assert run(capsys, f"fold linen {name} --input 2,3 --dry-run") == "the report\n"
    assert run(capsys, f"recalibrate linen {name} --data data.npy --dry-run") == "the report\n"
    printed = run(capsys, f"convert --from w.safetensors {name} --input 2,3 --dry-run")
    assert printed == "linear.weight -> kernel\n"
    assert "linear.bias  (4,)    float32" in run(
        capsys, f"convert --from linen {name} --input 2,3 --to-torch --dry-run"
    )
    pycache = [here.path / "__pycache__"]
    assert [p for p in sorted(here.path.iterdir()) if p not in pycache] == before


def test_recalibrate_on_a_file(here, fakes, capsys):
    options = "--arrays x --batch-size 2 --num-batches 2 --sequential"
    name = f"--model {here.name}:instance"
    run(capsys, f"recalibrate linen {name} --data data.npz {options} --out new")
    _, _, passes, given = fakes.calls[0]
    assert given["sequential"] is True and given["num_batches"] == 2
    for batches in passes:  # it can be read again
        assert [len(x) for (x,) in batches] == [2, 2, 1]
        np.testing.assert_array_equal(np.concatenate([x for (x,) in batches]), X)
    assert_holds("new", here.variables, lambda a: a + 1)


def test_recalibrate_on_a_function(here, fakes, capsys):
    name = f"--model {here.name}:Graph"
    run(capsys, f"recalibrate graph {name} --data {here.name}:batches --out new")
    _, variables, passes, given = fakes.calls[0]
    assert variables == [] and given["sequential"] is False and given["num_batches"] is None
    for batches in passes:
        assert [len(batch[0]) for batch in batches] == [3, 2]
    assert_holds("new", here.state)


def test_convert_from_torch(here, fakes, capsys):
    table = {"names": {"fc.*": "Dense_0/*"}, "flattened": {"fc": [8, 2, 2]}, "skip": ["head.*"]}
    (here.path / "table.json").write_text(json.dumps(table))
    command = f"convert --from w.pt --model {here.name}:factory --input 2,3 --options table.json"
    printed = run(capsys, f"{command} --to new")
    assert printed == "linear.weight -> kernel\nWritten: new\n"
    source, _, (variables, x), options = fakes.calls[0]
    assert source == "w.pt" and x.shape == (2, 3)
    assert options == {**table, "flattened": {"fc": (8, 2, 2)}}
    assert_holds("new", variables, lambda a: a + 5)
    run(capsys, f"convert --from w.pt --model {here.name}:Graph --to graph2")
    assert fakes.calls[1][2:] == ((), {})
    assert set(read_arrays("test", "graph2")) == set(flat_arrays(here.state))


def test_convert_to_torch(here, fakes, capsys):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the package safetensors")
    name = f"--model {here.name}:factory --input 2,3"
    run(capsys, f"convert --from linen {name} --to-torch --to w.safetensors")
    found = safetensors.load_file("w.safetensors")
    np.testing.assert_array_equal(found["linear.bias"], here.variables["params"]["Dense_0"]["bias"])
    assert set(found) == {"linear.bias", "half.a/b"} and found["half.a/b"].dtype == jnp.bfloat16
    _, (_, x), like = fakes.calls[0]
    assert like is None and x.shape == (2, 3)
    (here.path / "table.json").write_text('{"skip": ["a"]}')
    command = f"convert --from graph --model {here.name}:Graph --to-torch --to g.safetensors"
    run(capsys, f"{command} --like old.pt --options table.json")
    assert fakes.calls[1][1:] == ((), ("old.pt", (), {"skip": ["a"]}))
    wanted = here.state["linear"]["bias"][...]
    np.testing.assert_array_equal(safetensors.load_file("g.safetensors")["linear.bias"], wanted)


FOLD = "fold linen --model {n}:factory --input 2,3 --out new"
DATA = "recalibrate linen --model {n}:factory --out new --data"
REFUSED = {
    "no colon": ("fold linen --model nets --input 2,3 --out new", "module:attribute", "For ex"),
    "no module": (
        "fold linen --model nowhere_.nets:a --input 2,3 --out new",
        "there is no 'nowhere_'", "install its package",
    ),
    "broken module": (
        "fold linen --model {n}_broken:a --input 2,3 --out new",
        "ModuleNotFoundError: No module named 'nothing_of_this_name'", "Correct the module",
    ),
    "no attribute": (
        "fold linen --model {n}:absent --input 2,3 --out new", "no 'absent'", "factory", "Choose",
    ),
    "no model": ("fold linen --model {n}:number --input 2,3 --out new", "it is a int", "def model"),
    "needs arguments": (
        "fold linen --model {n}:needing --input 2,3 --out new", "it takes features", "def model",
    ),
    "fails": (
        "fold linen --model {n}:failing --input 2,3 --out new",
        "RuntimeError: no weights here", "def model",
    ),
    "returns no model": (
        "fold linen --model {n}:wrong --input 2,3 --out new", "it returned a int", "def model",
    ),
    "input": ("fold linen --model {n}:factory --input 2x3 --out new", "'2x3'", "For example 1,32"),
    "input's dtype": ("fold linen --model {n}:factory --input 2,3:int3 --out new", "2,3:int3"),
    "input of another width": (
        "fold linen --model {n}:factory --input 2,7 --out new",
        "Dense_0/kernel (3, 4), not (7, 4)", "Name the model",
    ),
    "input of another rank": (
        "fold linen --model {n}:picky --input 2,3 --out new",
        "the shapes (2, 3) it raised TypeError", "Give inputs that it takes",
    ),
    "no checkpoint": (
        "fold none --model {n}:factory --input 2,3 --out new", "not there", "Give the path",
    ),
    "other model": (
        "fold graph --model {n}:factory --input 2,3 --out new",
        "lacks batch_stats/BatchNorm_0/mean", "Name the model",
    ),
    "out exists": (
        "fold linen --model {n}:factory --input 2,3 --out graph", "'", "exists. Choose another",
    ),
    "out is the input": (
        "fold linen --model {n}:factory --input 2,3 --out linen", "exists. Choose another",
    ),
    "out within the input": (
        "fold linen --model {n}:factory --input 2,3 --out linen/d/x", "must not lie within",
    ),
    "export exists": (f"{FOLD} --export data.npy", "data.npy' exists"),
    "export is out": (f"{FOLD} --export ./new", "path of its own"),
    "platforms": (f"{FOLD} --platforms cpu", "got no --export. Add"),
    "dry export": (
        "fold linen --model {n}:factory --input 2,3 --dry-run --export x", "Leave one out",
    ),
    "data is absent": (f"{DATA} none.npz", "none.npz", "numpy.save"),
    "data is no file of NumPy": (f"{DATA} bad.npz", "bad.npz", "numpy.save"),
    "data holds objects": (f"{DATA} objects.npy", "objects.npy", "numpy.save"),
    "arrays are not named": (f"{DATA} data.npz", "has x, y", "--arrays x"),
    "arrays are not there": (f"{DATA} data.npz --arrays x,z", "not z", "Choose among"),
    "data without batches": (f"{DATA} {{n}}:nothing", "at least one batch", "Give data"),
    "data of no rows": (f"{DATA} empty.npy", "at least one", "(0, 3)"),
    "data is no iterable": (f"{DATA} {{n}}:number", "gives a int", "Make it a list"),
    "data is used up": (f"{DATA} {{n}}:used_up", "used up", "Name the function"),
    "no example": (
        "convert --from w.pt --model {n}:factory --to new", "an example input", "Add --input",
    ),
    "options": (
        "convert --from w.pt --model {n}:Graph --to new --options data.npy",
        "file of JSON", "For example",
    ),
    "options of no such name": (
        "convert --from w.pt --model {n}:Graph --to new --options bad.json", "got nams, skip in",
    ),
    "options without like": (
        "convert --from graph --model {n}:Graph --to-torch --to new.pt --options good.json",
        "Add --like",
    ),
    "like without back": (
        "convert --from w.pt --model {n}:Graph --to new --like w.pt", "Add --to-torch",
    ),
    "state dict in a folder": (
        "convert --from graph --model {n}:Graph --to-torch --to new", "must be written to a .safe",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used(case, here, fakes, capsys):
    (here.path / "bad.npz").write_bytes(b"PK\3\4 not really")
    (here.path / "good.json").write_text('{"names": {"a": "b"}}')
    (here.path / "bad.json").write_text('{"nams": {}, "names": {}, "skip": "x"}')
    np.save("objects.npy", np.array([{}], object), allow_pickle=True)
    np.save("empty.npy", np.zeros((0, 3), np.float32))
    command, *expected = REFUSED[case]
    command = command.format(n=here.name)
    before = sorted(here.path.rglob("*"))
    assert cli.main(command.split()) == 2
    printed, error = capsys.readouterr()
    assert error.startswith(f"jaxnorm: {command.split()[0]}: ") and "Traceback" not in error
    for text in expected:
        assert text in error
    assert "Written" not in printed and not fakes.calls
    after = [path for path in sorted(here.path.rglob("*")) if "__pycache__" not in str(path)]
    assert after == [path for path in before if "__pycache__" not in str(path)]


@pytest.mark.parametrize("kind", [ValueError, TypeError, FloatingPointError])
def test_what_a_tool_refuses_is_told_and_nothing_is_written(kind, here, capsys, monkeypatch):
    def fold(model, *args):
        raise kind("fold: the model must have a norm; got none. Nothing to fold.")

    monkeypatch.setattr(tools, "fold", fold, raising=False)
    assert cli.main(FOLD.format(n=here.name).split()) == 2
    error = capsys.readouterr().err
    assert error == "jaxnorm: fold: the model must have a norm; got none. Nothing to fold.\n"
    assert not (here.path / "new").exists()


def test_an_interrupt_says_that_nothing_was_written(here, capsys, monkeypatch):
    def fold(model, *args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "fold", fold, raising=False)
    assert cli.main(FOLD.format(n=here.name).split()) == 130
    assert "nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["fold", "a", "--model", "m:a", "--input", "1"],
        ["fold", "a", "--model", "m:a", "--input", "1", "--out", "b", "--dry-run"],
        ["recalibrate", "a", "--model", "m:a", "--out", "b"],
        ["recalibrate", "a", "--model", "m:a", "--data", "d", "--out", "b", "--batch-size", "0"],
        ["convert", "--from", "a", "--to", "b"],
    ],
)
def test_arguments_that_are_missing_or_contradict(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: jaxnorm" in capsys.readouterr().err


@pytest.mark.parametrize("text, low, high", [("4,2:int32", 0, 1), ("4,2:bool", False, True)])
def test_example_inputs_are_the_same_in_every_run(text, low, high):
    from jaxnorm.cli.named import example_inputs

    first, second = (example_inputs("fold", [text, "50:bfloat16"]) for _ in range(2))
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one, other)
    assert first[0].min() >= low and first[0].max() <= high
    assert first[1].dtype == jnp.bfloat16 and len(np.unique(first[1].astype("f"))) > 20


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from jaxnorm import cli\n"
        "try: cli.main(['fold', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'flax', 'orbax', 'safetensors', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "jaxnorm.tools.fold" in done.stdout and "jax.export" in done.stdout
