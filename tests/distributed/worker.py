"""One process of a run: norms over arrays that are sharded over all processes.

    worker.py FOLDER CASE...

test_processes.py runs it through `jaxnorm.distributed.launch`. FOLDER/inputs.npz holds the whole
batch, and every process takes its own rows from it. Process 0 writes FOLDER/results.npz.
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxnorm
from jaxnorm.distributed import initialize


def derivatives(norm, x, scale, bias, ct, direction):
    """Of sum(ct * y): y, statistics, gradients, and the gradients' derivative along a direction."""

    def loss(x, scale, bias):
        y, stats = norm(x, scale, bias)
        return jnp.sum(y * ct), (y, stats)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    along = lambda x: gradient(x, scale, bias)  # noqa: E731
    first, second, aux = jax.jvp(along, (x,), (direction,), has_aux=True)
    return aux, first, second


def batch_norm(x, scale, bias, mask, axis_name=None):
    y, stats = jaxnorm.batch_norm(
        x, scale, bias, jaxnorm.init_batch_stats(x.shape[-1]), training=True, decay=0.9,
        mask=mask, axis_name=axis_name,
    )  # fmt: skip
    return y, stats[:2]


def under_jit(mesh, x, scale, bias, mask, ct, direction):
    return derivatives(partial(batch_norm, mask=mask), x, scale, bias, ct, direction)


def under_shard_map(mesh, x, scale, bias, mask, ct, direction):
    def norm(x, scale, bias):
        mapped = jax.shard_map(
            partial(batch_norm, axis_name="data"), mesh=mesh,
            in_specs=(P("data"), P(), P(), None if mask is None else P("data")),
            out_specs=(P("data"), P()),
        )  # fmt: skip
        return mapped(x, scale, bias, mask)

    return derivatives(norm, x, scale, bias, ct, direction)


def row_norm(name):
    def run(mesh, x, scale, bias, mask, ct, direction):
        def norm(x, scale, bias):
            if name == "layer_norm":
                return jaxnorm.layer_norm(x, scale, bias), ()
            return jaxnorm.rms_norm(x, scale) + bias, ()

        return derivatives(norm, x, scale, bias, ct, direction)

    return run


# name: function, type of the mesh's axis, where x is split, whether there is a mask
CASES = {
    "jit": (under_jit, AxisType.Auto, P("data"), False),
    "jit masked": (under_jit, AxisType.Auto, P("data"), True),
    "jit explicit": (under_jit, AxisType.Explicit, P("data"), True),
    "shard_map masked": (under_shard_map, AxisType.Auto, P("data"), True),
    "layer_norm features": (row_norm("layer_norm"), AxisType.Auto, P(None, "data"), False),
    "rms_norm features": (row_norm("rms_norm"), AxisType.Auto, P(None, "data"), False),
}


def main(folder: Path, names: list[str]) -> None:
    assert initialize(timeout=60) and initialize()
    inputs, results = np.load(folder / "inputs.npz"), {}
    for name in names:
        function, axis_type, spec, masked = CASES[name]
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(axis_type,))

        def shard(array, spec, mesh=mesh):
            return jax.make_array_from_callback(
                array.shape, NamedSharding(mesh, spec), lambda index: array[index]
            )

        features = P(*spec[1:])
        with jax.set_mesh(mesh):
            whole = NamedSharding(mesh, P())  # every process gets all of the results
            run = jax.jit(partial(function, mesh), out_shardings=whole)
            for offset in (0.0, 1e4):
                got = run(
                    shard(inputs[f"x {offset:g}"], spec),
                    shard(inputs["scale"], features), shard(inputs["bias"], features),
                    shard(inputs["mask"], P("data")) if masked else None,
                    shard(inputs["ct"], spec), shard(inputs["direction"], spec),
                )  # fmt: skip
                for i, leaf in enumerate(jax.tree.leaves(got)):
                    results[f"{name} {offset:g} {i}"] = np.asarray(leaf)
    if jax.process_index() == 0:
        np.savez(folder / "results.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
