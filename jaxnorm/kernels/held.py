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

from jaxnorm.core import normalize
from jaxnorm.core.epilogue import Epilogue
from jaxnorm.core.measure import Measurement
from jaxnorm.core.replicas import Replicas
from jaxnorm.core.slices import Slices
from jaxnorm.kernels.tiles import Tiles, tiles_of


@dataclass(frozen=True)
class Norm:
    """The static half of a call: what is computed, for arrays of one rank."""

    operation: str
    measurement: Measurement
    epilogue: Epilogue
    kernels: tuple[str, ...] = ()
    """Platforms on which a kernel computes it."""
    insists: bool = False
    """Whether all else is an error."""
    interpreted: str | None = None
    """The platform whose kernels Pallas's interpreter runs, on any other; None: it does not."""

    def tiles(self, shape: tuple[int, ...], dtype) -> Tiles:
        """The blocks that a TPU's kernel cuts an array of that shape into."""
        return tiles_of(shape, self.measurement.slices.axes, dtype, self.measurement.slices.blocks)

    def among(self, replicas: Replicas) -> "Norm":
        """This norm for blocks that share their slices with others."""
        slices = replace(self.measurement.slices, replicas=replicas)
        return replace(self, measurement=replace(self.measurement, slices=slices))

    def behind(self) -> "Norm":
        """This norm for arrays with one more axis in front."""
        return replace(self, measurement=self.measurement.with_leading_axis())

    def plain(self, x: Array, *parameters: Array | None) -> Array:
        """The norm computed by `core`, for the compiler to fuse."""
        y, _ = normalize.normalize(
            x, *parameters, measurement=self.measurement, mask=None, epilogue=self.epilogue
        )
        return y

    def held(self, features: int, x: Array, *parameters: Array | None, mask=None) -> Array:
        """The norm of a block by `core`, with that many entries along the whole array's last axis.

        A mask says what of the block counts.
        """
        options = self._options(features, x)
        return normalize.normalize_block(x, *parameters, mask=mask, **options)

    def pulled_back(self, features: int, x: Array, dy: Array, *parameters: Array | None, mask=None):
        """Cotangents of `x` and of the parameters, in float32, from that of `y`."""
        options = self._options(features, x)
        return normalize.pull_back_block(x, dy, *parameters, mask=mask, **options)

    def _options(self, features: int, x: Array) -> dict:
        slices = self.measurement.slices
        if slices.blocks is not None:
            axis, groups = slices.blocks
            blocks = axis, groups * x.shape[axis] // features
            slices = HeldGroups(slices.axes, blocks, slices.replicas)
        measurement = replace(self.measurement, slices=slices)
        return {"measurement": measurement, "epilogue": self.epilogue}


@dataclass(frozen=True)
class HeldGroups(Slices):
    """Groups of channels, without splitting the axis that lies along the lanes of a register."""

    def reduce(
        self, reducer: Callable, array: Inexact[Array, "*shape"]
    ) -> Inexact[Array, "*slices"]:
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
