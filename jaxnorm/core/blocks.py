"""Blocks of consecutive entries of one axis: channels of a group, examples of a virtual batch.

Moments of blocks are taken without reshaping the activation: what is folded are its sums over all
other axes, which are small, so that an axis spread over devices stays where it is.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def fold(reducer: Callable, array: Array, axis: int, blocks: int) -> Array:
    """Reduce each block of an axis to one entry; `reducer` is jnp.sum, jnp.min or their like."""
    size = array.shape[axis]
    if size == 1:  # the same entry for all, as in a mask that broadcasts
        return array
    split = (*array.shape[:axis], blocks, size // blocks, *array.shape[axis + 1 :])

    def folded(array):
        return reducer(array.reshape(split), axis=axis + 1)

    spec, shards = _layout(array, axis)
    if shards > 1 and blocks % shards:
        spec[axis] = None
    return _partitioned(folded, array, shards, spec)


def spread(blocks: Array, like: Array) -> Array:
    """Repeat each entry that stands for a block of an axis; what is 1 there broadcasts anyway."""
    for axis, (number, size) in enumerate(zip(blocks.shape, like.shape, strict=True)):
        if number not in (1, size):
            over = _layout(like, axis)
            spec = [None if n == 1 else s for s, n in zip(over[0], blocks.shape, strict=True)]
            blocks = _partitioned(_repeat(axis, size), blocks, over[1], spec)
    return blocks


def _repeat(axis: int, size: int) -> Callable:
    def repeated(array):
        before, number, after = array.shape[:axis], array.shape[axis], array.shape[axis + 1 :]
        wide = jnp.broadcast_to(
            jnp.expand_dims(array, axis + 1), (*before, number, size // number, *after)
        )
        return wide.reshape(*before, size, *after)

    return repeated


def _layout(array: Array, axis: int) -> tuple[list, int]:
    """The axes of an Explicit mesh an array is spread over, by its type; and the shards of one."""
    sharding = jax.typeof(array).sharding
    spec = [*sharding.spec, *[None] * (array.ndim - len(sharding.spec))]
    names = spec[axis] if isinstance(spec[axis], tuple) else (spec[axis],)
    return spec, math.prod(sharding.mesh.shape[name] for name in names if name is not None)


def _partitioned(function: Callable, array: Array, shards: int, spec: list) -> Array:
    """Apply a reshape that splits or merges an axis, and leave its layout to the partitioner.

    Blocks that straddle the devices of an Explicit mesh have no type for it.
    """
    if shards == 1:
        return function(array)
    out_sharding: Any = jax.sharding.PartitionSpec(*spec)
    partitioned: Any = jax.sharding.auto_axes(function, out_sharding=out_sharding)
    return partitioned(array)
