"""Checksums against their formula in Python's integers, on every layout and dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.training import create_train_state
from jaxnorm.training.checkpoint import Checkpoints
from jaxnorm.training.checksum import checksums


def make_mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)


def plain_checksum(x):
    """The formula of the module, in Python's integers."""

    def mix(v):
        v ^= v >> 16
        v = v * 0x85EBCA6B % 2**32
        v ^= v >> 13
        v = v * 0xC2B2AE35 % 2**32
        return v ^ (v >> 16)

    width = min(x.dtype.itemsize // (2 if np.iscomplexobj(x) else 1), 4)
    words = np.frombuffer(np.ascontiguousarray(x).tobytes(), f"<u{width}")
    return sum(mix(int(word) ^ mix(place)) for place, word in enumerate(words)) % 2**32


@pytest.mark.sample
@pytest.mark.parametrize(
    "dtype",
    ["float32", "bfloat16", "float8_e5m2", "bool", "int8", "uint32", "complex64", "float64"],
)
def test_checksums_follow_their_formula_on_every_layout(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = np.random.default_rng(0).normal(size=(8, 6)) * 3
        x = np.asarray(jnp.asarray(x + 2j * x if dtype == "complex64" else x).astype(dtype))
        expected = plain_checksum(x)
        mesh = make_mesh()
        for spec in (P(), P("data"), P("data", "model"), P(("model", "data")), P(None, "model")):
            placed = jax.device_put(x, NamedSharding(mesh, spec))
            assert checksums("test", {"x": placed}) == {"x": expected}, spec
        assert checksums("test", {"x": jnp.asarray(x)}) == {"x": expected}


def test_checksums_see_every_bit_and_every_place():
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    seen = {
        checksums("test", {"x": jnp.asarray(x)})["x"],
        checksums("t", {"x": jnp.asarray(x.T)})["x"],
    }
    seen.add(checksums("test", {"x": jnp.asarray(np.roll(x, 1))})["x"])
    for bit in range(32):
        changed = x.copy()
        changed.view(np.uint32)[1, 2] ^= np.uint32(1 << bit)
        seen.add(checksums("test", {"x": jnp.asarray(changed)})["x"])
    assert len(seen) == 35


def drifted(mesh, spec=P(), shape=(4,)):
    """An array whose copies differ, on the last device only, in the sign of a zero."""
    sharding = NamedSharding(mesh, spec)
    parts = [np.zeros(sharding.shard_shape(shape), np.float32) for _ in mesh.devices.flat]
    parts[-1].flat[-1] = -0.0
    placed = [jax.device_put(p, d) for p, d in zip(parts, mesh.devices.flat)]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


@pytest.mark.parametrize("axis_type", (AxisType.Auto, AxisType.Explicit), ids=str)
@pytest.mark.parametrize("spec", [P(), P("model"), P(None, "data")], ids=str)
def test_replicas_that_differ_are_refused(tmp_path, axis_type, spec):
    mesh = make_mesh(axis_type)
    state = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((1, 3)))
    state = jax.device_put(state, NamedSharding(mesh, P()))
    bad = state.replace(batch_stats={"norm": {"mean": drifted(mesh, spec, (4, 4))}})
    message = "batch_stats/norm/mean differs between devices .* and .*synchronise them"
    with Checkpoints(tmp_path / "run") as checkpoints:
        with pytest.raises(ValueError, match=f"Checkpoints.save: all copies.*{message}"):
            checkpoints.save(bad)
        assert not (tmp_path / "run").exists()
        good = state.replace(
            batch_stats={"norm": {"mean": drifted(mesh, P("data", "model"), (4, 4))}}
        )
        checkpoints.save(good)
        with pytest.raises(ValueError, match=f"Checkpoints.restore: all copies.*{message}"):
            checkpoints.restore(bad)
        restored, _ = checkpoints.restore(good)
        mean = np.asarray(restored.batch_stats["norm"]["mean"])
        assert np.signbit(mean).sum() == 1 and np.signbit(mean[-1, -1])
