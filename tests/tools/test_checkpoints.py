"""Checkpoints of variables: what Orbax, safetensors and a run's checkpoints hold, whole or not."""

import importlib.util
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from tools.networks import NETWORKS, cast

from jaxnorm.tools import checkpoints
from jaxnorm.tools.checkpoints import check_new, matched, read_arrays, save_outputs, save_tree
from jaxnorm.training import Checkpoints, create_train_state

INSTALLED = importlib.util.find_spec("safetensors") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not INSTALLED, reason="the package safetensors")
FORMATS = ("", pytest.param(".safetensors", marks=NEEDS_PACKAGE))


def is_key(leaf):
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        if not is_key(a):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def zeros(tree):
    return jax.tree.map(lambda a: a if is_key(a) else jnp.zeros(a.shape, a.dtype), tree)


def boxed():
    init = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
    return nn.Dense(3, kernel_init=init).init(jax.random.key(0), jnp.ones((1, 2)))


TREES = {
    "linen": lambda: NETWORKS["linen/unet"]().variables,
    "linen bfloat16": lambda: cast(NETWORKS["linen/mlp"](), jnp.bfloat16).variables,
    "linen boxed": boxed,
    "nnx with dropout": lambda: nnx.state(NETWORKS["nnx/mlp"]().model),
    "nnx lists": lambda: nnx.state(NETWORKS["nnx/lists_and_dicts"]().model),
    "spectral": lambda: nnx.state(NETWORKS["nnx/normed_weights"]().model),
}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("name", TREES)
def test_what_is_saved_is_read(name, suffix, tmp_path):
    tree, path = TREES[name](), tmp_path / "deep" / f"x{suffix}"
    save_tree("test", path, tree)
    found, beside = matched("test", path, read_arrays("test", path), zeros(tree))
    assert_same(found, tree)
    assert beside == [] and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_folder_is_that_of_orbax(tmp_path):
    for name in ("linen/mlp", "nnx/mlp"):
        model, variables, _ = NETWORKS[name]()
        tree = variables or nnx.state(model)
        save_tree("test", tmp_path / name, tree)
        with ocp.StandardCheckpointer() as reader:
            assert_same(reader.restore(tmp_path / name, tree), tree)


@NEEDS_PACKAGE
def test_a_file_is_that_of_safetensors(tmp_path):
    from safetensors.numpy import load_file

    variables = NETWORKS["linen/mlp"]().variables
    save_tree("test", tmp_path / "file.safetensors", variables)
    flat = load_file(tmp_path / "file.safetensors")
    assert len(flat) == len(jax.tree.leaves(variables))
    for name, array in flat.items():
        at = variables
        for part in name.split("/"):
            at = at[part]
        np.testing.assert_array_equal(array, at)


@NEEDS_PACKAGE
def test_files_of_other_people(tmp_path):
    from safetensors.numpy import save_file

    variables = NETWORKS["linen/mlp"]().variables
    arrays = {
        ".".join(str(k.key) for k in keys): np.asarray(a)
        for keys, a in jax.tree_util.tree_leaves_with_path(variables)
    }
    save_file(arrays, tmp_path / "dots.safetensors")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        tree = {**variables, "opt_state": {"mu": jnp.zeros(3)}, "step": 7}
        manager.save(7, args=ocp.args.StandardSave(tree))
    for path, other in ((tmp_path / "dots.safetensors", []), (tmp_path / "run/7", ["opt_state"])):
        found, beside = matched("test", path, read_arrays("test", path), zeros(variables))
        assert_same(found, variables)
        assert set(beside) >= set(other)


@pytest.mark.parametrize("name", ["linen/mlp", "nnx/mlp"])
def test_checkpoints_of_training(name, tmp_path):
    network = NETWORKS[name]()
    state = create_train_state(network.model, optax.adam(0.1), 0, network.inputs[0])
    with Checkpoints(tmp_path) as run:
        run.save(state)
    like = network.variables or nnx.state(network.model)
    arrays = read_arrays("test", tmp_path / "0")
    found, beside = matched("test", tmp_path / "0", arrays, zeros(like))
    stored = jax.tree.leaves((state.params, state.batch_stats))
    counts = {np.asarray(a).tobytes() for a in stored}
    for leaf in jax.tree.leaves(found):
        if not is_key(leaf) and leaf.ndim:
            assert np.asarray(leaf).tobytes() in counts
    assert {"opt_state", "step", "rng"} <= set(beside)


def refuse(*expected, kind=ValueError):
    return pytest.raises(kind, match=".*".join(("^test: ", *expected)))


def test_variables_of_another_model():
    like = {"params": {"a": jnp.zeros(3), "b": jnp.zeros(2)}}
    arrays = {"params/a": np.ones(4, "f"), "params/c": np.ones(1, "f"), "step": np.ones(())}
    with refuse("run", "lacks params/b", "has besides params/c", r"params/a \(4,\), not \(3,\)"):
        matched("test", "run", arrays, like)
    # An NNX state has nothing around it, so that nothing beside it is another thing.
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    with refuse("has besides gamma"):
        arrays = {"kernel": np.ones((2, 3)), "bias": np.ones(3), "gamma": np.ones(3)}
        matched("test", "run", arrays, state)


def test_what_is_no_checkpoint(tmp_path):
    with refuse("not there", "Give the path"):
        read_arrays("test", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with refuse("is no checkpoint", "the folder that Orbax wrote"):
        read_arrays("test", tmp_path / "empty")
    (tmp_path / "model.pt").write_bytes(b"PK")
    with refuse("model.pt", "jaxnorm convert"):
        read_arrays("test", tmp_path / "model.pt")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            manager.save(step, args=ocp.args.StandardSave({"a": jnp.ones(2)}))
    with refuse("holds 10, 9", "one of them", "run/10"):
        read_arrays("test", tmp_path / "run")


@NEEDS_PACKAGE
def test_a_file_without_arrays_or_with_one_name_twice(tmp_path):
    from safetensors.numpy import save_file

    save_file({}, tmp_path / "none.safetensors")
    with refuse("must hold arrays"):
        read_arrays("test", tmp_path / "none.safetensors")
    twice = {"a.b": np.ones(1, "f"), "a/b": np.ones(1, "f")}
    save_file(twice, tmp_path / "twice.safetensors")
    with refuse("name of its own", "'a/b' twice"):
        read_arrays("test", tmp_path / "twice.safetensors")


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_damaged(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    rng = np.random.default_rng(0)
    save_tree("test", path, {"params": {"a": jnp.asarray(rng.normal(size=999), jnp.float32)}})
    files = [path] if suffix else [p for p in path.glob("d/*") if p.is_file()]
    assert files
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    with refuse("must be whole", f"x{suffix}"):
        read_arrays("test", path)


def test_nothing_is_replaced(tmp_path):
    tree = {"params": {"a": jnp.ones(2)}}
    file, folder = tmp_path / "file.safetensors", tmp_path / "folder"
    file.write_text("mine")
    folder.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path in (file, folder, tmp_path / "link"):
        with refuse("new path", path.name):
            save_tree("test", path, tree)
    with refuse("in a folder that can be written", "is a file"):
        save_tree("test", file / "x", tree)
    with refuse("must not lie within an input", "folder"):
        check_new("test", folder / "new", [folder])
    assert file.read_text() == "mine" and not list(folder.iterdir())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.safetensors", "folder", "link"]


@pytest.mark.parametrize("name", ["late", pytest.param("late.safetensors", marks=NEEDS_PACKAGE)])
def test_what_appears_meanwhile_is_not_replaced(name, tmp_path, monkeypatch):
    real = checkpoints._give_name

    def give(operation, temporary, path):
        path.write_text("from elsewhere")
        real(operation, temporary, path)

    monkeypatch.setattr(checkpoints, "_give_name", give)
    with refuse("new path"):
        save_tree("test", tmp_path / name, {"params": {"a": jnp.ones(2)}})
    assert (tmp_path / name).read_text() == "from elsewhere"
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_all_outputs_or_none(error, tmp_path, monkeypatch):
    real, calls = checkpoints._write_bytes, []

    def write(path, content):
        calls.append(path)
        real(path, content[:1] if len(calls) == 2 else content)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(checkpoints, "_write_bytes", write)
    outputs = {
        tmp_path / "folder": {"a": jnp.ones(2)},
        tmp_path / "x": b"abc",
        tmp_path / "y": b"d",
    }
    with pytest.raises(type(error)) as caught:
        save_outputs("test", outputs)
    assert len(calls) == 2 and not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert "test: " in str(caught.value) and "no space left" in str(caught.value)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    (tmp_path / "x.safetensors").write_bytes(b"")
    with refuse("safetensors must be installed", "pip install", kind=ImportError):
        read_arrays("test", tmp_path / "x.safetensors")
    with refuse("safetensors must be installed", kind=ImportError):
        save_tree("test", tmp_path / "y.safetensors", {"a": jnp.ones(2)})
    assert not (tmp_path / "y.safetensors").exists()
