"""The mathematics of `core` as it runs on a block in on-chip memory.

A block holds whole slices, or chunks of slices whose sums are put together (`chunks`). So `core`
can do with a block what it does with an array, and no formula is written a second time here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Inexact

from jaxnorm.core import affine
from jaxnorm.core.finish import Finish
from jaxnorm.core.replicas import ALONE, Alone
from jaxnorm.core.slices import Reduction


@dataclass(frozen=True)
class KernelNorm:
    """The static half of a call: what is computed, for arrays of one rank."""

    operation: str
    reduction: Reduction
    finish: Finish
    platforms: tuple[str, ...] = ()
    """Platforms on which a kernel computes it."""
    required: bool = False
    """Whether a program without a kernel is an error."""
    interpreted: str | None = None
    """The platform whose kernels Pallas's interpreter runs, on any other; None: it does not."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes that are reduced as a whole."""
        return self.reduction.axes

    @property
    def split_axes(self) -> tuple[int, ...]:
        """The axis that is reduced within groups of its entries, if there is one."""
        return () if self.reduction.blocks is None else (self.reduction.blocks[0],)

    @property
    def groups(self) -> int:
        """The number of groups of the axis that is split; 1 where none is."""
        return 1 if self.reduction.blocks is None else self.reduction.blocks[1]

    @property
    def crosses_devices(self) -> bool:
        """True if a named axis joins slices of several devices."""
        return self.reduction.replicas != ALONE

    def with_replicas(self, replicas: Alone) -> "KernelNorm":
        """This norm for blocks that share their slices with others."""
        return replace(self, reduction=replace(self.reduction, replicas=replicas))

    def with_leading_axis(self) -> "KernelNorm":
        """This norm for arrays with one more axis in front."""
        r = self.reduction
        axes = tuple(a + 1 for a in r.axes)
        blocks = r.blocks and (r.blocks[0] + 1, r.blocks[1])
        return replace(self, reduction=replace(r, axes=axes, blocks=blocks))

    def with_padded_slices(self, axes: tuple[int, ...], sizes: tuple[int, ...]) -> "KernelNorm":
        """This norm for blocks of padded slices, with those sizes before along those axes."""
        r = self.reduction
        padded = PaddedSlices(axes, r.epsilon, centered=r.centered, sizes=sizes)
        return replace(self, reduction=padded)

    def without_epilogue(self) -> "KernelNorm":
        """This norm without scale, bias and activation, with its result in float32."""
        return replace(self, finish=Finish(jnp.float32))

    def xla_value(self, x: Array, *parameters: Array | None) -> Array:
        """The norm of an array by `core`, for XLA to fuse."""
        y, _ = affine.normalize(
            x, *parameters, reduction=self.reduction, mask=None, finish=self.finish
        )
        return y

    def block_value(self, features: int, x: Array, *parameters: Array | None, mask=None) -> Array:
        """The norm of a block by `core`; `features` is the size of the whole array's last axis.

        A mask says which elements of the block count.
        """
        options = self._options(features, x)
        return affine.normalize_held(x, *parameters, mask=mask, **options)

    def block_cotangents(
        self, features: int, x: Array, dy: Array, *parameters: Array | None, mask=None
    ) -> Any:
        """Cotangents of `x` and of the parameters, in float32, from that of `y`."""
        options = self._options(features, x)
        return affine.pull_back_held(x, dy, *parameters, mask=mask, **options)

    def _options(self, features: int, x: Array) -> dict:
        reduction = replace(self.reduction, at_hand=True)
        if reduction.blocks is not None:
            axis, groups = reduction.blocks
            blocks = axis, groups * x.shape[axis] // features
            reduction = LaneGroups(**{**vars(reduction), "blocks": blocks})
        return {"reduction": reduction, "finish": self.finish}


@dataclass(frozen=True)
class PaddedSlices(Reduction):
    """Slices in a block that is padded to powers of two; what is added does not count."""

    sizes: tuple[int, ...] = ()
    """Sizes of the reduced axes without what is added."""

    def size(self, shape: tuple[int, ...]) -> int:
        """Elements in a slice."""
        return math.prod(self.sizes)

    def over(self, reducer, array: Array) -> Array:
        """Apply jnp.sum or jnp.min to each slice."""
        nothing = jnp.asarray(jnp.inf if reducer is jnp.min else 0, array.dtype)
        for axis, size in zip(self.axes, self.sizes):
            if size < array.shape[axis]:
                here = lax.broadcasted_iota(jnp.int32, array.shape, axis)
                array = jnp.where(here < size, array, nothing)
        return reducer(array, axis=self.axes, keepdims=True)


@dataclass(frozen=True)
class LaneGroups(Reduction):
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
    lane = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) % size
    for step in _doubling(size):  # sums over up to 2 step lanes that end here
        lanes = lanes + jnp.where(lane >= step, _rolled(lanes, step), 0)
    for step in _doubling(size):  # the last lane's sum, to twice as many
        here = (lane < size - step) & (lane >= size - 2 * step)
        lanes = jnp.where(here, _rolled(lanes, -step), lanes)
    return lanes


def _first(lanes: Array, size: int) -> Array:
    """The first entry of groups of consecutive lanes, in each of their lanes."""
    lane = lax.broadcasted_iota(jnp.int32, lanes.shape, 1) % size
    for step in _doubling(size):
        here = (lane >= step) & (lane < 2 * step)
        lanes = jnp.where(here, _rolled(lanes, step), lanes)
    return lanes


def _doubling(size: int) -> list[int]:
    return [2**i for i in range((size - 1).bit_length())]


def _rolled(lanes: Array, shift: int) -> Array:
    from jax.experimental.pallas import tpu as pltpu  # which takes long to load

    return pltpu.roll(lanes, shift % lanes.shape[1], 1)
