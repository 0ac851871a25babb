"""Slices that are too large for a block: their chunks are read one after the other, in passes.

To `core`, the chunks of a slice are like shards of it on several devices: where devices need a
collective, chunks need a sum over all of them. Pass k puts the k-th of these sums together and
knows those before; the last pass knows all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from jaxnorm.core.replicas import Replicas
from jaxnorm.kernels.tiles import Tiles


@dataclass(frozen=True)
class GridOrder:
    """The order in which programs take the blocks: slices, passes, chunks of the slice."""

    tiles: Tiles
    passes: int
    """1 where blocks hold whole slices."""

    @property
    def outer(self) -> tuple[int, ...]:
        """Axes that are not cut into chunks."""
        return tuple(a for a in range(len(self.tiles.shape)) if a not in self.tiles.cut)

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the kernel's programs."""
        sizes, cut = self.tiles.grid, self.tiles.cut
        passes = (self.passes,) if cut else ()
        return (*(sizes[a] for a in self.outer), *passes, *(sizes[a] for a in cut))

    @property
    def semantics(self) -> list[Literal["parallel", "arbitrary"]]:
        """For each axis of the grid, whether it may be taken in any order."""
        return ["parallel" if i < len(self.outer) else "arbitrary" for i in range(len(self.grid))]

    @property
    def chunks(self) -> int:
        """The number of chunks of a slice."""
        return math.prod(self.tiles.grid[a] for a in self.tiles.cut)

    def index(self, *program, since: int = 0) -> tuple:
        """A program's index in the tiles' grid; before a pass, that of the first chunk already."""
        if not self.tiles.cut:
            return program
        outer, (number, *chunks) = program[: len(self.outer)], program[len(self.outer) :]
        chunks = [i if since == 0 else jnp.where(number >= since, i, 0) for i in chunks]
        of_axis = dict(zip((*self.outer, *self.tiles.cut), (*outer, *chunks)))
        return tuple(of_axis[a] for a in range(len(of_axis)))

    def spec(self, block: tuple[int, ...], index_of: Callable, since: int) -> pl.BlockSpec:
        """The block of an array that is first read in pass `since`, and is the first until then."""
        return pl.BlockSpec(block, lambda *program: index_of(*self.index(*program, since=since)))

    def is_first(self, *program) -> Any:
        """True for a program that has the first chunk of a slice."""
        return sum(program[len(self.outer) + 1 :]) == 0

    def during(self, number: int, *program) -> Callable[[Callable], Any]:
        """A decorator that runs a function in the pass of that number."""
        if self.passes == 1:
            return lambda function: function()
        return pl.when(program[len(self.outer)] == number)


@dataclass(frozen=True, eq=False)
class ListedSums(Replicas):
    """Stand-in for `Chunks` that lists the shapes and dtypes of all sums and minima."""

    minima: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    sums: list[list[jax.ShapeDtypeStruct]] = field(default_factory=list)

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """The sum over one chunk."""
        self.sums.append([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays])
        return arrays

    def min(self, array: Array) -> Array:
        """The minimum over one chunk."""
        self.minima.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
        return array

    @property
    def scratch(self) -> list[jax.ShapeDtypeStruct]:
        """Arrays that have to be kept in on-chip memory between chunks."""
        return [*self.minima, *(a for group in self.sums for a in group)]

    def kept_in(self, refs: Sequence[Any], number: int, first: Any, chunks: int) -> "Chunks":
        """The chunks of a slice in the pass of that number, with that scratch memory."""
        some = iter(refs)
        minima = [next(some) for _ in self.minima]
        sums = [[next(some) for _ in group] for group in self.sums]
        return Chunks(chunks, number, first, minima, sums)


@dataclass(frozen=True, eq=False)
class Chunks(Replicas):
    """All chunks of a slice, seen from one of them."""

    chunks: int
    number: int
    """The number of the pass."""
    first: Any
    """Whether this is the first chunk of the pass."""
    minima: Sequence[Any]
    """Scratch memory for each minimum."""
    sums: Sequence[Sequence[Any]]
    """Scratch memory for each sum, with those that are taken together."""
    next_minimum: Iterator[int] = field(default_factory=count)
    next_sum: Iterator[int] = field(default_factory=count)

    def size(self) -> int:
        """Number of chunks, where they are equal; elsewhere a mask says what counts."""
        return self.chunks

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """Sums over all chunks once they are known; in passes before, values that nobody uses."""
        position = next(self.next_sum)
        kept = self.sums[position]
        if position < self.number:
            return tuple(ref[...] for ref in kept)
        if position == self.number:
            for ref, array in zip(kept, arrays):
                ref[...] = array + jnp.where(self.first, jnp.zeros_like(array), ref[...])
        return arrays

    def min(self, array: Array) -> Array:
        """Minimum of the first chunk: any value in the range of the slice is good enough."""
        ref = self.minima[next(self.next_minimum)]
        if self.number == 0:
            ref[...] = jnp.where(self.first, array, ref[...])
        return ref[...]
