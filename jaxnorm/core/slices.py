"""Slices of an array: which elements belong together, and over which replicas they go on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtyping import Array

from jaxnorm.core.blocks import broadcast_blocks, reduce_blocks
from jaxnorm.core.replicas import SINGLE, Replicas


@dataclass(frozen=True)
class Slices:
    """A partition of the elements of an array into the sets that have moments of their own.

    A per-slice array has the same rank, with size 1 on the axes that are reduced, and with the
    number of blocks on an axis that is reduced in blocks.
    """

    axes: tuple[int, ...]
    """The axes that are reduced as a whole."""
    blocks: tuple[int, int] | None = None
    """A further axis, and the number of blocks of consecutive entries in which it is reduced.

    Such as groups of channels; None for no such axis.
    """
    replicas: Replicas = SINGLE
    """The replicas that hold parts of each slice."""

    def size(self, shape: tuple[int, ...]) -> int | Array:
        """Elements in a slice of an array of this shape, over all replicas."""
        number = math.prod(shape[a] for a in self.axes)
        if self.blocks is not None:
            axis, blocks = self.blocks
            number *= shape[axis] // blocks
        return number * self.replicas.size()

    def reduce(self, reducer: Callable, array: Array) -> Array:
        """Apply jnp.sum, jnp.min or their like to each slice, without the replicas."""
        reduced = reducer(array, axis=self.axes, keepdims=True)
        return reduced if self.blocks is None else reduce_blocks(reducer, reduced, *self.blocks)

    def broadcast(self, values: Array, like: Array) -> Array:
        """Repeat what belongs to a block for each of its entries; all else broadcasts anyway."""
        return values if self.blocks is None else broadcast_blocks(values, like)

    def reduced_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a per-slice array, for an array of this shape."""
        sizes = [1 if a in self.axes else n for a, n in enumerate(shape)]
        if self.blocks is not None:
            axis, blocks = self.blocks
            sizes[axis] = blocks
        return tuple(sizes)

    def with_leading_axis(self) -> "Slices":
        """These slices in each entry of one more axis in front."""
        blocks = self.blocks and (self.blocks[0] + 1, self.blocks[1])
        return replace(self, axes=tuple(a + 1 for a in self.axes), blocks=blocks)
