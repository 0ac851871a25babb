"""Checkpoints: on any mesh, never half written, and a killed run ends like an uninterrupted one."""

import dataclasses
import functools
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import Dense
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.linen import BatchNorm
from jaxnorm.monitor import Monitor
from jaxnorm.training import create_train_state, make_train_step
from jaxnorm.training.checkpoint import Checkpoints, DamagedCheckpointError

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
OPTIMIZER = optax.chain(optax.clip(1.0), optax.adam(0.1))  # an empty node, NamedTuples


def make_mesh(devices, axis_type=AxisType.Auto):
    shape = (devices // 2, 2) if devices > 1 else (1, 1)
    return jax.make_mesh(
        shape, ("data", "model"), axis_types=(axis_type,) * 2, devices=jax.devices()[:devices]
    )


def several_kinds(seed):
    """Leaves that a model may have beside float32: name -> (array, layout)."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(16, 4)).astype(np.float32)
    return {
        "both": (wide, P("data", "model")),
        "joined": (wide.astype(jnp.bfloat16), P(("data", "model"))),
        "one": (wide > 0, P(None, "model")),
        "complex": (wide[:3] + 1j * wide[3:6], P()),
        "small": (wide.astype(jnp.float8_e4m3fn), P("model")),
        "empty": (np.zeros((0, 3), np.int8), P()),
        "keys": (rng.integers(2**32, size=(8, 4), dtype=np.uint32), P("data")),
        "nan": (np.float32([np.nan, -0.0, np.inf]), P()),
    }


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(not train, name="norm")(Dense(4, use_bias=False)(x))


NET = Net()


@functools.cache
def first(model):
    """The first state on the host, without its key."""
    state = create_train_state(model, OPTIMIZER, 0, jnp.ones((1, 3)))
    return jax.tree.map(np.array, state.replace(rng=None))


def make_state(model=NET, seed=0, mesh=None, extra=True):
    """A state with every leaf on the mesh; without one, bound to no device."""
    state = first(model).replace(rng=jax.random.key(seed))
    state = state.replace(params=jax.tree.map(lambda x: x + np.float32(seed), state.params))
    leaves = several_kinds(seed) if extra else {}
    if mesh is None:
        state = jax.tree.map(jnp.asarray, state)
        leaves = {name: jnp.asarray(x) for name, (x, _) in leaves.items()}
    else:
        state = jax.device_put(state, NamedSharding(mesh, P()))
        leaves = {
            name: jax.device_put(x, NamedSharding(mesh, spec)) for name, (x, spec) in leaves.items()
        }
    if extra:
        leaves["keys"] = jax.random.wrap_key_data(leaves["keys"], impl="rbg")
    return state.replace(model_state=leaves)


def files_of(folder):
    """All files under a folder: path -> bytes."""
    return {str(p): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def raw(x):
    """The bits of an array on the host."""
    key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if key else x).tobytes()


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), path
        assert raw(x) == raw(y), path


def assert_placed_like(state, template):
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(template)):
        assert x.committed == getattr(like, "committed", True)
        assert x.sharding == like.sharding, (x.sharding, like.sharding)


@pytest.mark.sample
@pytest.mark.parametrize(
    "kind, axis_type", [("linen", AxisType.Auto), ("nnx", AxisType.Explicit)], indirect=["kind"]
)
def test_any_mesh_to_any_other(tmp_path, kind, axis_type):
    model, meshes = kind.make(), {n: make_mesh(n, axis_type) for n in (8, 2, 1)}
    for number, saved_on in enumerate((8, 1)):
        state = make_state(model, mesh=meshes[saved_on])
        with Checkpoints(tmp_path / str(number)) as checkpoints:
            checkpoints.save(state, data={"position": [3, 0.1], "name": "é"})
            for restored_on in (8, 2, 1):
                template = make_state(model, seed=5, mesh=meshes[restored_on])
                restored, data = checkpoints.restore(template)
                assert_identical(restored, state)
                assert_placed_like(restored, template)
                assert data == {"position": [3, 0.1], "name": "é"}


def test_unbound_arrays_and_types_as_templates(tmp_path):
    mesh = make_mesh(8)
    state = make_state(mesh=mesh)
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        placed, data = checkpoints.restore(types)
        assert_identical(placed, state)
        assert_placed_like(placed, state)
        assert data == {}
        for template in (make_state(seed=1), jax.eval_shape(lambda: make_state())):
            unbound, _ = checkpoints.restore(template)
            assert_identical(unbound, state)
            assert not any(x.committed for x in jax.tree.leaves(unbound))


def test_saving_goes_on_while_the_state_is_donated(tmp_path, kind, mse, batches, snapshot):
    """The next steps overwrite the buffers, and the files must hold the values from before."""
    data, model = batches(4), kind.make(dropout=0.3)
    step = make_train_step(model, OPTIMIZER, mse)
    state = create_train_state(model, OPTIMIZER, 0, data[0]["x"])
    expected = []
    with Checkpoints(tmp_path, keep=None) as checkpoints:
        for batch in data:
            expected.append(snapshot(state))
            checkpoints.save(state)
            state, _ = step(state, batch)
    with Checkpoints(tmp_path) as checkpoints:
        fresh = create_train_state(model, OPTIMIZER, 1, data[0]["x"])
        for number, values in enumerate(expected):
            restored, _ = checkpoints.restore(fresh, step=number)
            found = snapshot(restored)
            assert found.keys() == values.keys()
            for path in values:
                np.testing.assert_array_equal(found[path], values[path], err_msg=path)
        resumed, _ = checkpoints.restore(fresh)
    resumed, _ = step(resumed, data[-1])
    assert_identical(resumed, state)


def test_old_ones_are_deleted(tmp_path):
    state = make_state(extra=False)
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 4, 9):
            checkpoints.save(state.replace(step=jnp.int32(step)))
        checkpoints.wait()
        assert checkpoints.latest() == 9
        assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["4", "9"]
        checkpoints.save(state.replace(step=jnp.int32(10)))
        with pytest.raises(ValueError, match="has step 10 already"):  # though still being written
            checkpoints.save(state.replace(step=jnp.int32(10)))


def largest(step):
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(step):
    path = largest(step / "state" / "ocdbt.process_0")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(step):
    """Flip a bit in the largest array, where the file format has no checksum."""
    path = largest(step / "state" / "ocdbt.process_0")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def change_the_data(step):
    path = step / "record" / "metadata"
    path.write_text(path.read_text().replace('"at": 2', '"at": 3'))


DAMAGE = {
    "truncated": truncate,
    "flipped": flip_a_bit,
    "values missing": lambda step: shutil.rmtree(step / "state" / "ocdbt.process_0"),
    "index missing": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "record missing": lambda step: shutil.rmtree(step / "record"),
    "record changed": change_the_data,
    "empty": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
}


def with_wide(state, wide):
    return state.replace(model_state={"wide": wide})


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with steps 0, 1, 2, and their states; one leaf is too large for the index."""
    folder = tmp_path_factory.mktemp("three") / "run"
    states = []
    with Checkpoints(folder) as checkpoints:
        for seed in range(3):
            wide = np.random.default_rng(seed).normal(size=(64, 64)).astype(np.float32)
            state = make_state(seed=seed, extra=False)
            states.append(with_wide(state.replace(step=jnp.int32(seed)), jnp.asarray(wide)))
            checkpoints.save(states[-1], data={"at": seed})
    return folder, states


@pytest.mark.sample
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_the_newest_whole_one_taken(tmp_path, three, damage):
    folder, states = shutil.copytree(three[0], tmp_path / "run"), three[1]
    damage(folder / "2")
    before = files_of(folder)
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(DamagedCheckpointError, match=r"step 2, .* is damaged: ") as error:
            checkpoints.restore(states[0], step=2)
        assert error.value.step == 2
        with pytest.warns(UserWarning, match=r"step 2, .* is damaged: .*Restored step 1 instead"):
            restored, data = checkpoints.restore(states[0])
        assert_identical(restored, states[1])
        assert data == {"at": 1}
        assert files_of(folder) == before
    # In a fresh process, as after a crash: the run reaches step 2 again and saves it.
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.warns(UserWarning):
            checkpoints.restore(states[0])
        checkpoints.save(states[2], data={"at": 2})
        with warnings.catch_warnings(action="error"):
            assert_identical(checkpoints.restore(states[0])[0], states[2])
        checkpoints.wait()
    moved = [p for p in folder.glob("damaged/*/2/**/*") if p.is_file()]
    assert len(moved) == sum(path.startswith(str(folder / "2") + os.sep) for path in before)
    assert {p.name for p in folder.iterdir()} == {"1", "2", "damaged"}


def test_all_damaged(tmp_path, three):
    folder = shutil.copytree(three[0], tmp_path / "run")
    for step in range(3):
        truncate(folder / str(step))
    before = files_of(folder)
    with (
        pytest.raises(DamagedCheckpointError, match=r"\[0, 1, 2\] .* whole.*The newest: .*step 2"),
        Checkpoints(folder) as checkpoints,
    ):
        checkpoints.restore(three[1][0])
    assert files_of(folder) == before


def test_unfinished_ones_do_not_count(tmp_path, three):
    folder = shutil.copytree(three[0], tmp_path / "run")
    shutil.copytree(folder / "2", folder / "7.orbax-checkpoint-tmp")
    before = files_of(folder)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 2
        assert_identical(checkpoints.restore(three[1][0])[0], three[1][2])
        assert files_of(folder) == before
        checkpoints.save(three[1][2].replace(step=jnp.int32(3)))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "3"]


OTHERS = {
    "shape": (
        lambda s: with_wide(s, jnp.zeros((64, 65))),
        r"wide is stored as float32\[64, 64\] and wanted as float32\[64, 65\]",
    ),
    "dtype": (
        lambda s: with_wide(s, jnp.zeros((64, 64), jnp.bfloat16)),
        r"stored as float32\[64, 64\] and wanted as bfloat16\[64, 64\]",
    ),
    "missing": (
        lambda s: s.replace(model_state={}),
        r"model_state/wide is stored as float32\[64, 64\] and wanted as nothing",
    ),
    "more": (
        lambda s: s.replace(model_state={**s.model_state, "new": jnp.zeros(())}),
        r"model_state/new is stored as nothing and wanted as float32\[\]",
    ),
    "key": (
        lambda s: s.replace(rng=jax.random.key(0, impl="rbg")),
        r"rng is stored as key<fry>\[\] and wanted as key<rbg>\[\]",
    ),
    "optimizer": (
        lambda s: s.replace(opt_state=optax.sgd(0.1, momentum=0.5).init(s.params)),
        r"opt_state/1/0/count is stored as int32\[\] and wanted as nothing; .* and \d+ more",
    ),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused(three, other):
    folder, states = three
    change, message = other
    before = files_of(folder)
    with Checkpoints(folder) as checkpoints, pytest.raises(ValueError, match=message) as error:
        checkpoints.restore(change(states[0]))
    assert not isinstance(error.value, DamagedCheckpointError)
    assert str(error.value).startswith("Checkpoints.restore: the template must have the leaves")
    assert files_of(folder) == before


def test_nothing_to_restore(tmp_path, three):
    state = three[1][0]
    for folder, step, has in (
        (tmp_path / "missing", None, "none"),
        (tmp_path, None, "none"),
        (three[0], 7, r"\[0, 1, 2\]"),
    ):
        with (
            Checkpoints(folder) as checkpoints,
            pytest.raises(FileNotFoundError, match=f"which has {has}. Look at the path"),
        ):
            checkpoints.restore(state, step)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path, three):
    folder, states = three
    before = files_of(folder)
    with Checkpoints(folder) as checkpoints:
        for state in states:
            with pytest.raises(ValueError, match=r"state.step=\d, and .* has step 2 already. Go"):
                checkpoints.save(state)
    assert files_of(folder) == before
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(NotADirectoryError, match="Checkpoints: folder must be a folder"):
        Checkpoints(path)
    with (
        pytest.raises(OSError, match=r"Checkpoints.save: a checkpoint could not be written"),
        Checkpoints(path / "below") as checkpoints,
    ):
        checkpoints.save(states[0])
    assert path.read_text() == "precious"


def test_a_failure_to_write_is_raised_and_harms_nothing(tmp_path, monkeypatch):
    state = make_state(extra=False)

    def full(directory):
        raise OSError("no space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        before = files_of(tmp_path / "0")
        with monkeypatch.context() as patch:
            patch.setattr("jaxnorm.training.checkpoint.sizes_of_files", full)
            checkpoints.save(state.replace(step=jnp.int32(1)))
            with pytest.raises(OSError, match=r"could not be written .* no space left on device"):
                checkpoints.wait()
        assert checkpoints.latest() == 0
        checkpoints.save(state.replace(step=jnp.int32(2)))
        checkpoints.wait()
        assert checkpoints.latest() == 2
    assert files_of(tmp_path / "0") == before


@pytest.mark.parametrize("axis_type", AXIS_TYPES, ids=str)
def test_another_mesh_may_be_set_and_the_template_donated(tmp_path, axis_type):
    state = make_state(mesh=make_mesh(2, axis_type), extra=False)
    template = make_state(seed=1, mesh=make_mesh(1, axis_type), extra=False)
    with jax.set_mesh(make_mesh(8, axis_type)), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        jax.tree.map(lambda x: x.delete(), template)
        restored, _ = checkpoints.restore(template)
    assert_identical(restored, state)
    assert_placed_like(restored, template)


MONITORS = {
    "none": None,
    "all": Monitor(every=1, capacity=3),
    "longer": Monitor(every=1, capacity=4),
    "values": Monitor(every=1, capacity=3, gradients=False),
}


@functools.cache
def monitored(name):
    """A state of a run with a monitor, after two steps."""
    state = create_train_state(NET, OPTIMIZER, 0, jnp.ones((1, 3)))
    step = make_train_step(NET, OPTIMIZER, lambda y, x: (y**2).mean(), monitor=MONITORS[name])
    for x in np.random.default_rng(0).normal(size=(2, 8, 3)).astype("f"):
        state, _ = step(state, x)
    return step, state


@pytest.mark.parametrize("wanted", MONITORS)
@pytest.mark.parametrize("saved", MONITORS)
def test_a_run_is_restored_whatever_looked_at_it(tmp_path, saved, wanted):
    (_, state), (step, template) = monitored(saved), monitored(wanted)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        restored, _ = checkpoints.restore(template)
    assert_identical(restored.replace(monitor=None), state.replace(monitor=None))
    if saved == wanted:
        assert_identical(restored.monitor, state.monitor)
    elif restored.monitor is not None:
        assert restored.monitor.capacity == template.monitor.capacity
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(restored.monitor))
    following, _ = step(restored, jnp.ones((8, 3)))
    if wanted != "none":
        assert int(following.monitor.written) == (3 if saved == wanted else 1)


def test_samples_of_other_places_are_not_taken_for_ones_own(tmp_path):
    _, state = monitored("all")
    schema = state.monitor.schema
    other = dataclasses.replace(schema, parameters=schema.parameters[::-1])  # as many numbers
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        template = state.replace(monitor=state.monitor.replace(schema=other))
        restored, _ = checkpoints.restore(template)
    assert restored.monitor.schema == other and int(restored.monitor.written) == 0
