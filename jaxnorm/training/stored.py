"""The arrays in the files of a checkpoint, and the sizes that these files must have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxnorm.training.record import first_of, place, plain_type

SIZES = "_SIZES"  # a file beside the arrays


def sizes_of_files(directory: Any) -> dict[str, int]:
    """The number of bytes of every file below a directory."""
    files = (root / name for root, _, names in directory.walk() for name in names)
    return {str(file.relative_to(directory)): file.stat().length for file in files}


def read_values(path: Any, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Plain arrays by name, each with the sharding of its leaf."""

    def restore_args(leaf: Any) -> ocp.RestoreArgs:
        sharding = place(leaf)
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        shape, dtype = plain_type(leaf)
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape, dtype=dtype)

    found = sizes_of_files(path)
    sizes = json.loads((path / SIZES).read_text())
    lost = [name for name, size in sizes.items() if found.get(name) != size]
    if lost:
        raise ValueError(f"{first_of(lost)} missing or of another size")
    # A handler waits for no other process, as a manager would. So a process that cannot read its
    # part does not keep the others waiting.
    handler = ocp.PyTreeCheckpointHandler()
    try:
        stored = {name: restore_args(leaf) for name, leaf in leaves.items() if leaf.size}
        wanted = unflatten_dict(stored, sep="/")
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted, partial_restore=True)
        read = flatten_dict(handler.restore(path, args=args), sep="/")
    finally:
        handler.close()
    # Orbax stores nothing for an array without elements.
    empty = {name: zeros_for(leaf) for name, leaf in leaves.items() if not leaf.size}
    return empty | {name: jnp.asarray(value) for name, value in read.items()}


def zeros_for(leaf: Any) -> jax.Array:
    """Zeros in the stored shape and dtype of a leaf, with its sharding."""
    return jnp.zeros(*plain_type(leaf), device=place(leaf))
