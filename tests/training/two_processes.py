"""One of two processes with two devices each: python two_processes.py RANK PORT FOLDER.

It restores a checkpoint of a single process onto a mesh over both, saves a later state, and prints
the messages of its errors.
"""

import json
import os
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm.training.checkpoint as module
from jaxnorm.training import create_train_state
from jaxnorm.training.checkpoint import Checkpoints


def refusal(function, *args):
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(rank, port, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    local = create_train_state(nn.BatchNorm(), optax.sgd(0.1), 0, jnp.ones((1, 3)))
    local = local.replace(model_state={"wide": jnp.zeros((8, 4))})

    def typed(path, x):
        spec = P("data") if "wide" in jax.tree_util.keystr(path) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    template = jax.tree_util.tree_map_with_path(typed, local)
    different = np.full(3, rank, np.float32)
    drifted = jax.make_array_from_callback((3,), NamedSharding(mesh, P()), lambda i: different[i])
    said = {}
    with Checkpoints(folder) as checkpoints:
        state, data = checkpoints.restore(template)
        said["data"] = data
        said["local"] = refusal(checkpoints.save, local)
        said["again"] = refusal(checkpoints.save, state)
        said["drifted"] = refusal(checkpoints.save, state.replace(batch_stats={"mean": drifted}))
        later = jax.jit(
            lambda s: s.replace(step=s.step + 1, model_state={"wide": s.model_state["wide"] + 1})
        )(state)
        checkpoints.save(later, data={"at": 1})
        checkpoints.wait()

        read = module.read_values

        def unreadable(path, leaves):
            if rank == 1 and path.parent.name == "1":
                raise OSError("no such file here")
            return read(path, leaves)

        module.read_values = unreadable
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state, _ = checkpoints.restore(template)
        said["step"], said["warned"] = int(state.step), [str(w.message) for w in caught]
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    # Not at the top: pytest imports this file too, and the flags would then apply to its process.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
