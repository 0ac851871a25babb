"""Bad requests to save or restore are refused in three parts before anything is written."""

import re

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


def make_state():
    return create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((1, 3)))


def donated(state):
    jax.tree.map(lambda x: x.delete(), state)
    return state


BAD_SAVES = {
    "no state": (TypeError, "state must be a TrainState; got dict", lambda s: {"a": 1}, {}),
    "a number": (TypeError, "step is int", lambda s: s.replace(step=3), {}),
    "types": (TypeError, "ShapeDtypeStruct", lambda s: jax.eval_shape(lambda: s), {}),
    "donated": (ValueError, "buffers must still be there", donated, {}),
    "tuple": (TypeError, "lists rather than tuples", lambda s: s, {"a": (1, 2)}),
    "array": (TypeError, "Python numbers", lambda s: s, {"a": np.arange(2)}),
    "int key": (TypeError, "strings as keys", lambda s: s, {1: 2}),
    "no dict": (TypeError, "must be a dict", lambda s: s, [1]),
}


@pytest.mark.parametrize("case", BAD_SAVES.values(), ids=BAD_SAVES)
def test_bad_arguments(tmp_path, case):
    kind, message, change, data = case
    state = change(make_state())
    with (
        Checkpoints(tmp_path / "run") as checkpoints,
        pytest.raises(kind, match=f"Checkpoints.save: .*{re.escape(message)}"),
    ):
        checkpoints.save(state, data=data)
    assert not (tmp_path / "run").exists()


def test_bad_uses(tmp_path):
    state = make_state()
    checkpoints = Checkpoints(tmp_path / "run")
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(checkpoints.save)(state)
    with pytest.raises(TypeError, match="template must be a TrainState; got NoneType"):
        checkpoints.restore(None)
    for keep in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"keep must be a positive .* keep={keep}"):
            Checkpoints(tmp_path, keep=keep)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    explicit = jax.device_put(state, NamedSharding(mesh, P()))
    with pytest.raises(TypeError, match="must say which devices"):
        checkpoints.restore(jax.eval_shape(lambda: explicit))
