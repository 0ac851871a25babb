"""A run that can be killed at any moment and started again.

    python resumable.py STEPS FOLDER OUT [FOLDER OUT ...]

It trains a small network with batch normalization and dropout on eight simulated devices, with a
checkpoint every few steps. It continues from the newest checkpoint if there is one. At the end it
writes every leaf of the state to OUT. Then it does the same for the next FOLDER and OUT.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxnorm.linen import BatchNorm
from jaxnorm.training import create_train_state, make_train_step
from jaxnorm.training.checkpoint import Checkpoints

SEED, EVERY, SAMPLES, BATCH = 3, 5, 96, 16


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = BatchNorm(not train, name="norm")(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def order_of(epoch):
    """The order of the data in an epoch, from (seed, epoch) alone."""
    return np.random.default_rng([SEED, epoch]).permutation(SAMPLES)


def main(folder, out, steps):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(SEED)
    x = rng.normal(1, 2, (SAMPLES, 4)).astype(np.float32)
    samples = {"x": x, "y": np.sin(x.sum(-1, keepdims=True))}
    optimizer = optax.adam(1e-2)
    state = create_train_state(Net(), optimizer, SEED, jnp.ones((1, 4)))
    state = jax.device_put(state, NamedSharding(mesh, P()))
    step = make_train_step(Net(), optimizer, lambda y, batch: ((y - batch["y"]) ** 2).mean())
    with Checkpoints(folder) as checkpoints:
        data = {"epoch": 0, "batch": 0}
        if checkpoints.latest() is not None:
            state, data = checkpoints.restore(state)
        print("from", int(state.step), flush=True)
        for _ in range(int(state.step), steps):
            chosen = order_of(data["epoch"])[data["batch"] * BATCH :][:BATCH]
            batch = {name: values[chosen] for name, values in samples.items()}
            state, _ = step(state, jax.device_put(batch, NamedSharding(mesh, P("data"))))
            position = data["epoch"] * (SAMPLES // BATCH) + data["batch"] + 1
            data = dict(zip(("epoch", "batch"), divmod(position, SAMPLES // BATCH)))
            if int(state.step) % EVERY == 0:
                checkpoints.save(state, data=data)
    leaves = jax.tree_util.tree_leaves_with_path(state.replace(rng=jax.random.key_data(state.rng)))
    np.savez(out, **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves})
    print("done", int(state.step), flush=True)


if __name__ == "__main__":
    # Not at the top: pytest imports this file too, and the flags would then apply to its process.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    cache = os.environ["RESUMABLE_CACHE"]
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    for folder, out in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        main(folder, out, int(sys.argv[1]))
