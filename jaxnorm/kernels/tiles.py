"""The division of an array into blocks that fit into a TPU's on-chip memory.

A block holds whole slices. What is left of its room is filled from the last axis to the first, so
that a block is contiguous in memory, or nearly so. Slices that are too large for that are cut into
chunks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp

from jaxnorm.kernels.block import KernelNorm

LANES = 128
# Elements of a block: large enough for the bandwidth of a copy, small enough for two blocks of each
# operand and what is computed of them in float32.
ROOM = 2**18
# What a single slice may fill, before it is cut: a block of one slice has as many elements.
MOST = 2**20


@dataclass(frozen=True)
class Tiles:
    """Blocks of an array, in a grid that has one axis for each axis of the array."""

    shape: tuple[int, ...]
    block: tuple[int, ...]
    cut: tuple[int, ...] = ()
    """Reduced axes of which a block holds only a chunk."""

    @property
    def grid(self) -> tuple[int, ...]:
        """The number of blocks along each axis."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.block))

    @property
    def ragged(self) -> tuple[int, ...]:
        """Axes whose last block reaches over the edge."""
        sizes = zip(self.shape, self.block)
        return tuple(a for a, (size, step) in enumerate(sizes) if size % step)

    @property
    def elements(self) -> int:
        """The number of elements of a block in memory, filled up to whole registers."""
        return _padded(self.block, 8)

    @property
    def fits(self) -> bool:
        """True if on-chip memory has room for a block; not for groups of very many channels."""
        return self.elements <= MOST

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The block of an array that broadcasts to this one."""
        return tuple(1 if size == 1 else step for size, step in zip(shape, self.block))

    @staticmethod
    def index_of(shape: tuple[int, ...], index: Sequence) -> tuple:
        """The block index in an array that broadcasts to this one, for a block of this grid."""
        return tuple(0 if size == 1 else i for size, i in zip(shape, index))


def refusal(norm: KernelNorm, shape: tuple[int, ...], dtype, parameter_shapes=()) -> str | None:
    """Reason why a call of that shape has no kernel on TPUs; None if it has one."""
    del parameter_shapes  # all that broadcast are taken
    tiles = tiles_for(norm, shape, dtype)
    return None if tiles.fits else f"a block of {tiles.block} does not fit into on-chip memory"


def tiles_for(norm: KernelNorm, shape: tuple[int, ...], dtype) -> Tiles:
    """The blocks that a norm's kernel cuts an array of that shape into."""
    return tiles_of(shape, norm.axes, dtype, norm.slices.blocks)


def tiles_of(
    shape: tuple[int, ...], whole: tuple[int, ...], dtype, blocks: tuple[int, int] | None = None
) -> Tiles:
    """Blocks of an array of that shape that hold the axes `whole` undivided, if they can.

    Args:
        shape: of the array.
        whole: axes that are reduced.
        dtype: of the array; narrow ones are packed along the second to last axis.
        blocks: an axis, and into how many groups it is split; a block holds whole groups.
    """
    rank = len(shape)
    packed = 8 * max(1, 4 // jnp.dtype(dtype).itemsize)
    block = [size if a in whole else 1 for a, size in enumerate(shape)]
    unit = [1] * rank
    unit[-1] = LANES
    if rank > 1:
        unit[-2] = packed
    if blocks is not None:
        axis, groups = blocks
        unit[axis] = math.lcm(unit[axis], shape[axis] // groups)
    cut = []
    least = [min(u, n) if a not in whole else n for a, (u, n) in enumerate(zip(unit, shape))]
    for a in sorted(whole):
        if _padded(least, packed) <= MOST:
            break
        step = min(unit[a], shape[a])
        room = ROOM // _padded((*least[:a], step, *least[a + 1 :]), packed)
        least[a] = block[a] = min(max(1, room) * step, shape[a])
        if block[a] < shape[a]:
            cut.append(a)
    for a in reversed(range(rank)):
        if a in whole or (blocks is not None and a < rank - 1):
            continue
        room = ROOM // _padded((*block[:a], min(unit[a], shape[a]), *block[a + 1 :]), packed)
        fits = max(1, room) * min(unit[a], shape[a])
        block[a] = shape[a] if fits >= shape[a] else fits // unit[a] * unit[a]
        if block[a] < shape[a]:
            # Axes before it are cut into single entries, except the one that is packed.
            if a == rank - 1 and rank > 1 and a - 1 not in whole:
                block[a - 1] = min(unit[a - 1], shape[a - 1])
            break
    return Tiles(shape, tuple(block), tuple(cut))


def _padded(block: Sequence[int], packed: int) -> int:
    *outer, last = block
    elements = -(-last // LANES) * LANES
    if outer:
        *outer, rows = outer
        elements *= -(-rows // packed) * packed
    return elements * math.prod(outer)
