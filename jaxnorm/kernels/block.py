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
from jaxtyping import Array

from jaxnorm.core import normalize
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.replicas import Replicas
from jaxnorm.core.slices import Slices


@dataclass(frozen=True)
class KernelNorm:
    """The static half of a call: what is computed, for arrays of one rank."""

    operation: str
    measurement: Measurement
    epilogue: Epilogue
    platforms: tuple[str, ...] = ()
    """Platforms on which a kernel computes it."""
    required: bool = False
    """Whether a program without a kernel is an error."""
    interpreted: str | None = None
    """The platform whose kernels Pallas's interpreter runs, on any other; None: it does not."""

    @property
    def slices(self) -> Slices:
        """The elements that are normalized together."""
        return self.measurement.slices

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes that are reduced as a whole."""
        return self.slices.axes

    @property
    def split_axes(self) -> tuple[int, ...]:
        """The axis that is reduced within groups of its entries, if there is one."""
        return () if self.slices.blocks is None else (self.slices.blocks[0],)

    @property
    def groups(self) -> int:
        """The number of groups of the axis that is split; 1 where none is."""
        return 1 if self.slices.blocks is None else self.slices.blocks[1]

    @property
    def crosses_devices(self) -> bool:
        """True if a named axis joins slices of several devices."""
        return not self.slices.replicas.is_single

    def with_replicas(self, replicas: Replicas) -> "KernelNorm":
        """This norm for blocks that share their slices with others."""
        return self._with(replace(self.slices, replicas=replicas))

    def with_leading_axis(self) -> "KernelNorm":
        """This norm for arrays with one more axis in front."""
        return self._with(self.slices.with_leading_axis())

    def with_padded_slices(self, axes: tuple[int, ...], sizes: tuple[int, ...]) -> "KernelNorm":
        """This norm for blocks of padded slices, with those sizes before along those axes."""
        return self._with(PaddedSlices(axes, sizes=sizes))

    def without_epilogue(self) -> "KernelNorm":
        """This norm without scale, bias and activation, with its result in float32."""
        return replace(self, epilogue=Epilogue(jnp.float32))

    def xla_value(self, x: Array, *parameters: Array | None) -> Array:
        """The norm of an array by `core`, for XLA to fuse."""
        y, _ = normalize.normalize(
            x, *parameters, measurement=self.measurement, mask=None, epilogue=self.epilogue
        )
        return y

    def block_value(self, features: int, x: Array, *parameters: Array | None, mask=None) -> Array:
        """The norm of a block by `core`; `features` is the size of the whole array's last axis.

        A mask says which elements of the block count.
        """
        options = self._options(features, x)
        return normalize.normalize_block(x, *parameters, mask=mask, **options)

    def block_cotangents(
        self, features: int, x: Array, dy: Array, *parameters: Array | None, mask=None
    ) -> Any:
        """Cotangents of `x` and of the parameters, in float32, from that of `y`."""
        options = self._options(features, x)
        return normalize.pull_back_block(x, dy, *parameters, mask=mask, **options)

    def _options(self, features: int, x: Array) -> dict:
        slices = self.slices
        if slices.blocks is not None:
            axis, groups = slices.blocks
            blocks = axis, groups * x.shape[axis] // features
            slices = LaneGroups(slices.axes, blocks, slices.replicas)
        measurement = replace(self.measurement, slices=slices)
        return {"measurement": measurement, "epilogue": self.epilogue}

    def _with(self, slices: Slices) -> "KernelNorm":
        return replace(self, measurement=replace(self.measurement, slices=slices))


@dataclass(frozen=True)
class PaddedSlices(Slices):
    """Slices in a block that is padded to powers of two; what is added does not count."""

    sizes: tuple[int, ...] = ()
    """Sizes of the reduced axes without what is added."""

    def size(self, shape: tuple[int, ...]) -> int:
        """Elements in a slice."""
        return math.prod(self.sizes)

    def reduce(self, reducer, array: Array) -> Array:
        """Apply jnp.sum or jnp.min to each slice."""
        nothing = jnp.asarray(jnp.inf if reducer is jnp.min else 0, array.dtype)
        for axis, size in zip(self.axes, self.sizes):
            if size < array.shape[axis]:
                here = lax.broadcasted_iota(jnp.int32, array.shape, axis)
                array = jnp.where(here < size, array, nothing)
        return reducer(array, axis=self.axes, keepdims=True)


@dataclass(frozen=True)
class LaneGroups(Slices):
    """Groups of channels, without splitting the axis that lies along the lanes of a register."""

    def reduce(self, reducer: Callable, array: Array) -> Array:
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
