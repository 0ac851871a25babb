"""Blocks of consecutive entries of one axis: channels of a group, examples of a virtual batch.

Moments of blocks are taken without reshaping the activation: what is reduced in blocks are its sums
over all other axes, which are small, so that an axis that is sharded over devices stays so.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def reduce_blocks(reducer: Callable, array: Array, axis: int, blocks: int) -> Array:
    """Reduce each block of an axis to one entry; `reducer` is jnp.sum, jnp.min or their like."""
    size = array.shape[axis]
    if size == 1:  # the same entry for all, as in a mask that broadcasts
        return array
    split = (*array.shape[:axis], blocks, size // blocks, *array.shape[axis + 1 :])

    def reduced(array):
        return reducer(array.reshape(split), axis=axis + 1)

    spec, names, shards = _sharding_of(array, axis)
    if shards > 1 and blocks % shards:
        spec[axis] = None
    return _partitioned(reduced, array, names, spec)


def broadcast_blocks(blocks: Array, like: Array) -> Array:
    """Repeat each entry that stands for a block of an axis; what is 1 there broadcasts anyway."""
    for axis, (number, size) in enumerate(zip(blocks.shape, like.shape, strict=True)):
        if number not in (1, size):
            spec, names, _ = _sharding_of(like, axis)
            spec = [None if n == 1 else s for s, n in zip(spec, blocks.shape, strict=True)]
            blocks = _partitioned(_repeat(axis, size), blocks, names, spec)
    return blocks


def reshard_like(array: Array, like: Array) -> Array:
    """An array that broadcasts to another, sharded over an Explicit mesh as that is by its type."""
    mesh = jax.typeof(like).sharding.mesh
    spec: Any = [None if n == 1 else s for n, s in zip(array.shape, spec_of(like))]
    if mesh.empty or spec == spec_of(array):
        return array
    return jax.sharding.reshard(array, NamedSharding(mesh, PartitionSpec(*spec)))


def _repeat(axis: int, size: int) -> Callable:
    def repeated(array):
        before, number, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
        wide = jnp.broadcast_to(
            jnp.expand_dims(array, axis + 1), (*before, number, size // number, *after)
        )
        return wide.reshape(*before, size, *after)

    return repeated


def _sharding_of(array: Array, axis: int) -> tuple[list, list[str], int]:
    """The sharding of an array over an Explicit mesh, by its type; of one axis its mesh axes."""
    sharding, spec = jax.typeof(array).sharding, spec_of(array)
    over = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    names = [name for name in over if name is not None]
    return spec, names, math.prod(sharding.mesh.shape[name] for name in names)


def _partitioned(function: Callable, array: Array, names: list[str], spec: list) -> Array:
    """Apply a reshape that splits or merges an axis, and leave its layout to the partitioner.

    Blocks that straddle the devices of an Explicit mesh have no type for it.
    """
    if not names:
        return function(array)
    out: Any = PartitionSpec(*spec)
    partitioned: Any = jax.sharding.auto_axes(function, axes=tuple(names), out_sharding=out)
    return partitioned(array)


def spec_of(array: Array) -> list[Any]:
    """The mesh axes over which each axis of an array is sharded, by its type; None: none."""
    spec = jax.typeof(array).sharding.spec
    return [*spec, *[None] * (array.ndim - len(spec))]
