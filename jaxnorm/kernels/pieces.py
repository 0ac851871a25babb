"""Slices that are too large for a block: their pieces are brought one after the other, in turns.

To `core` the pieces of a slice are what shards of it on several devices are, with a sum over all of
them where devices have a collective. In turn k the k-th of these sums is put together, and those
before are known; in the last turn all are.
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
class Walk:
    """The order in which programs take the blocks: slices, turns, pieces of the slice."""

    tiles: Tiles
    turns: int
    """1 where blocks hold whole slices."""

    @property
    def outer(self) -> tuple[int, ...]:
        """Axes that are not cut into pieces."""
        return tuple(a for a in range(len(self.tiles.shape)) if a not in self.tiles.cut)

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of the kernel's programs."""
        sizes, cut = self.tiles.grid, self.tiles.cut
        turns = (self.turns,) if cut else ()
        return (*(sizes[a] for a in self.outer), *turns, *(sizes[a] for a in cut))

    @property
    def semantics(self) -> list[Literal["parallel", "arbitrary"]]:
        """The axes of the grid that may be taken in any order."""
        return ["parallel" if i < len(self.outer) else "arbitrary" for i in range(len(self.grid))]

    @property
    def pieces(self) -> int:
        """The number of pieces of a slice."""
        return math.prod(self.tiles.grid[a] for a in self.tiles.cut)

    def index(self, *program, since: int = 0) -> tuple:
        """A program's place in the tiles' grid; before a turn, at the first piece already."""
        if not self.tiles.cut:
            return program
        outer, (turn, *pieces) = program[: len(self.outer)], program[len(self.outer) :]
        pieces = [i if since == 0 else jnp.where(turn >= since, i, 0) for i in pieces]
        places = dict(zip((*self.outer, *self.tiles.cut), (*outer, *pieces)))
        return tuple(places[a] for a in range(len(places)))

    def spec(self, block: tuple[int, ...], place: Callable, since: int) -> pl.BlockSpec:
        """The block of an array that is first read in that turn: until then it stays."""
        return pl.BlockSpec(block, lambda *program: place(*self.index(*program, since=since)))

    def is_first(self, *program) -> Any:
        """True for a program that has the first piece of a slice."""
        return sum(program[len(self.outer) + 1 :]) == 0

    def during(self, turn: int, *program) -> Callable[[Callable], Any]:
        """Do something in that turn."""
        if self.turns == 1:
            return lambda function: function()
        return pl.when(program[len(self.outer)] == turn)


@dataclass(frozen=True, eq=False)
class Sums(Replicas):
    """Takes note of what is put together of a piece, and of its shape."""

    least: list[jax.ShapeDtypeStruct] = field(default_factory=list)
    totals: list[list[jax.ShapeDtypeStruct]] = field(default_factory=list)

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """The sum over one piece."""
        self.totals.append([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays])
        return arrays

    def min(self, array: Array) -> Array:
        """The minimum over one piece."""
        self.least.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
        return array

    @property
    def all(self) -> list[jax.ShapeDtypeStruct]:
        """For each a place is needed where it is kept."""
        return [*self.least, *(a for group in self.totals for a in group)]

    def kept(self, refs: Sequence[Any], turn: int, first: Any, pieces: int) -> "Pieces":
        """These pieces with those places kept."""
        some = iter(refs)
        least = [next(some) for _ in self.least]
        totals = [[next(some) for _ in group] for group in self.totals]
        return Pieces(pieces, turn, first, least, totals)


@dataclass(frozen=True, eq=False)
class Pieces(Replicas):
    """All pieces of a slice, seen from one of them."""

    number: int
    turn: int
    first: Any
    """Whether this is the first piece of the turn."""
    least: Sequence[Any]
    """Where each minimum is kept."""
    totals: Sequence[Sequence[Any]]
    """Where each sum is kept, with those that are taken together."""
    minima: Iterator[int] = field(default_factory=count)
    sums: Iterator[int] = field(default_factory=count)

    def size(self) -> int:
        """Number of pieces, where they are equal; elsewhere a mask says what counts."""
        return self.number

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """Sums over all pieces, once they are known; before, what is of no use."""
        place = next(self.sums)
        kept = self.totals[place]
        if place < self.turn:
            return tuple(ref[...] for ref in kept)
        if place == self.turn:
            for ref, array in zip(kept, arrays):
                ref[...] = array + jnp.where(self.first, jnp.zeros_like(array), ref[...])
        return arrays

    def min(self, array: Array) -> Array:
        """The first piece's: all that is asked for is a value in the range of the slice."""
        ref = self.least[next(self.minima)]
        if self.turn == 0:
            ref[...] = jnp.where(self.first, array, ref[...])
        return ref[...]
