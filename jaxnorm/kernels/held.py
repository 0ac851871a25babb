"""The mathematics of `core`, as it runs on a block that is held in on-chip memory.

A block holds whole slices, or pieces of slices whose sums are put together (`pieces`), so what
`core` does with an array it can do with a block: nothing is computed here that is not written
there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from jaxnorm.core import affine
from jaxnorm.core.finish import Finish
from jaxnorm.core.replicas import Alone
from jaxnorm.core.slices import Reduction
from jaxnorm.kernels.tiles import Tiles, tiles_of


@dataclass(frozen=True)
class Norm:
    """The static half of a call: what is computed, for arrays of one rank."""

    operation: str
    reduction: Reduction
    finish: Finish
    kernels: tuple[str, ...] = ()
    """Platforms on which a kernel computes it."""
    insists: bool = False
    """Whether all else is an error."""
    interpreted: str | None = None
    """The platform whose kernels Pallas's interpreter runs, on any other; None: it does not."""

    def tiles(self, shape: tuple[int, ...], dtype) -> Tiles:
        """The blocks that a TPU's kernel cuts an array of that shape into."""
        return tiles_of(shape, self.reduction.axes, dtype, self.reduction.blocks)

    def among(self, replicas: Alone) -> "Norm":
        """This norm for blocks that share their slices with others."""
        return replace(self, reduction=replace(self.reduction, replicas=replicas))

    def behind(self) -> "Norm":
        """This norm for arrays with one more axis in front."""
        r = self.reduction
        axes = tuple(a + 1 for a in r.axes)
        blocks = r.blocks and (r.blocks[0] + 1, r.blocks[1])
        return replace(self, reduction=replace(r, axes=axes, blocks=blocks))

    def plain(self, x: Array, *parameters: Array | None) -> Array:
        """The norm computed by `core`, for the compiler to fuse."""
        y, _ = affine.normalize(
            x, *parameters, reduction=self.reduction, mask=None, finish=self.finish
        )
        return y

    def held(self, features: int, x: Array, *parameters: Array | None, mask=None) -> Array:
        """The norm of a block by `core`, with that many entries along the whole array's last axis.

        A mask says what of the block counts.
        """
        options = self._options(features, x)
        return affine.normalize_held(x, *parameters, mask=mask, **options)

    def pulled_back(self, features: int, x: Array, dy: Array, *parameters: Array | None, mask=None):
        """Cotangents of `x` and of the parameters, in float32, from that of `y`."""
        options = self._options(features, x)
        return affine.pull_back_held(x, dy, *parameters, mask=mask, **options)

    def _options(self, features: int, x: Array) -> dict:
        reduction = replace(self.reduction, at_hand=True)
        if reduction.blocks is not None:
            axis, groups = reduction.blocks
            blocks = axis, groups * x.shape[axis] // features
            reduction = HeldGroups(**{**vars(reduction), "blocks": blocks})
        return {"reduction": reduction, "finish": self.finish}


@dataclass(frozen=True)
class HeldGroups(Reduction):
    """Groups of channels, without splitting the axis that lies along the lanes of a register."""

    def over(self, reducer: Callable, array: Inexact[Array, "*shape"]) -> Inexact[Array, "*slices"]:
        """Sums of groups, or the first entry of each for a minimum, repeated for its channels."""
        reduced = reducer(array, axis=self.axes, keepdims=True)
        axis, groups = self.blocks or (-1, 1)
        size = array.shape[axis] // groups
        if size == 1:
            return reduced
        lanes = jnp.broadcast_to(reduced.reshape(1, -1), (_SUBLANES, array.shape[axis]))
        mixed = _first(lanes, size) if reducer is jnp.min else _totals(lanes, size)
        return mixed[:1].reshape(reduced.shape)


_SUBLANES = 8  # rows of a register, which is what can be rolled


def _totals(lanes: Array, size: int) -> Array:
    """Sums of groups of consecutive lanes, in each of their lanes, in 2 log2(size) steps."""
    place = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) % size
    for step in _doubling(size):  # sums over up to 2 step lanes that end here
        lanes = lanes + jnp.where(place >= step, _rolled(lanes, step), 0)
    for step in _doubling(size):  # the last lane's sum, to twice as many
        here = (place < size - step) & (place >= size - 2 * step)
        lanes = jnp.where(here, _rolled(lanes, -step), lanes)
    return lanes


def _first(lanes: Array, size: int) -> Array:
    """The first entry of groups of consecutive lanes, in each of their lanes."""
    place = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) % size
    for step in _doubling(size):
        here = (place >= step) & (place < 2 * step)
        lanes = jnp.where(here, _rolled(lanes, step), lanes)
    return lanes


def _doubling(size: int) -> list[int]:
    return [2**i for i in range((size - 1).bit_length())]


def _rolled(lanes: Array, shift: int) -> Array:
    from jax.experimental.pallas import tpu as pltpu  # which takes long to load

    return pltpu.roll(lanes, shift % lanes.shape[1], 1)
