"""Kernels for TPUs: every element crosses the memory bus once in each direction.

Forward: one read of `x`, one write of `y`. Backward: one read of `x` and `dy`, one write of `dx`;
the moments are computed again from the block at hand, so that nothing but `x` is kept. Only a slice
that is too large for on-chip memory is read once for each sum over it, piece by piece.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxnorm._jax import manual_type
from jaxnorm.kernels.held import Norm
from jaxnorm.kernels.pieces import Sums, Walk
from jaxnorm.kernels.tiles import Tiles

# Float32 arrays of a block's size that the compiler holds beside the operands' double buffers.
_TEMPORARIES = 8
_DEFAULT_LIMIT = 16 * 2**20


def refusal(norm: Norm, shape: tuple[int, ...], dtype, parameter_shapes=()) -> str | None:
    """Why a call of that shape has no kernel; None: it has."""
    del parameter_shapes  # all that broadcast are taken
    tiles = norm.tiles(shape, dtype)
    return None if tiles.fits else f"a block of {tiles.block} does not fit into on-chip memory"


def forward(norm: Norm, x: Array, residual: Array | None, *parameters: Array | None):
    """`y`, and the sum of `x` and `residual` where there is one."""
    tiles = norm.tiles(x.shape, x.dtype)
    if tiles.cut and residual is not None:  # added once, and not in every turn
        total = x + residual
        return [*forward(norm, total, None, *parameters), total]
    large = [x] if residual is None else [x, residual]
    out = [_result(x, x.shape, norm.epilogue.dtype)]
    if residual is not None:
        out.append(_result(x, x.shape, x.dtype))

    def compute(norm: Norm, valid, *blocks):
        x, *others = blocks[: len(large)]
        for other in others:
            x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
        chosen = _placed(parameters, blocks[len(large) :])
        mask = valid if tiles.cut else None
        return [norm.held(tiles.shape[-1], x, *chosen, mask=mask), *(x for _ in others)]

    given = [p for p in parameters if p is not None]
    return _call(norm, tiles, compute, [*large, *given], out, last=1)


def backward(norm: Norm, x: Array, parameters, dy: Array, dtotal: Array | None):
    """`dx` and the derivatives of those parameters that are given.

    `dtotal` is the cotangent of `x` itself where `x` is a result too: it is added to `dx`.
    """
    tiles = norm.tiles(x.shape, x.dtype)
    given = [p for p in parameters if p is not None]
    large = [x, dy] if dtotal is None else [x, dy, dtotal]
    parts = [_partial_sums(tiles, p.shape) for p in given]
    out = [_result(x, x.shape, x.dtype), *(_result(x, s, jnp.float32) for s, *_ in parts)]

    def compute(norm: Norm, valid, *blocks):
        x, dy, *others = (_inside(valid, block) for block in blocks[: len(large)])
        chosen = _placed(parameters, blocks[len(large) :])
        mask = valid if tiles.cut else None
        dx, *derived = norm.pulled_back(tiles.shape[-1], x, dy, *chosen, mask=mask)
        for other in others:
            dx = dx + other.astype(dx.dtype)
        return [dx, *(d for d in derived if d is not None)]

    places = [None, *(part[1:] for part in parts)]
    dx, *sums = _call(norm, tiles, compute, [*large, *given], out, places, last=2)
    return dx, *(jnp.sum(s, axis=0).astype(p.dtype) for s, p in zip(sums, given))


def _call(norm: Norm, tiles: Tiles, compute: Callable, operands, out, places=None, *, last: int):
    """Run `compute` on every block.

    Args:
        norm: what is computed.
        tiles: the blocks.
        compute: a function of a norm, of which elements lie inside the array, and of blocks.
        operands: arrays that broadcast to the tiles' shape.
        out: shapes of results.
        places: for each result its block, and where that lies for an index of the tiles' grid;
            None: it is cut like an operand.
        last: where slices are cut, in how many turns operands but the first are looked at.
    """
    results = [p or _place(tiles, a.shape) for p, a in zip(places or [None] * len(out), out)]
    bytes_of = [a.dtype.itemsize for a in (*operands, *out) if a.shape == tiles.shape]
    needed = tiles.elements * (2 * sum(bytes_of) + 4 * _TEMPORARIES)
    sums = Sums()
    if tiles.cut:
        blocks = [jax.ShapeDtypeStruct(tiles.of(a.shape), a.dtype) for a in operands]
        valid = jax.ShapeDtypeStruct(tiles.block, jnp.bool_) if tiles.ragged else None
        jax.eval_shape(partial(compute, norm.among(sums)), valid, *blocks)
    walk = Walk(tiles, turns=1 + len(sums.totals))

    def body(*refs):
        given, rest = refs[: len(operands)], refs[len(operands) :]
        found, kept = rest[: len(out)], rest[len(out) :]
        program = [pl.program_id(i) for i in range(len(walk.grid))]
        valid = _valid(tiles, walk.index(*program))

        def take(turn: int):
            here = norm
            if tiles.cut:
                here = norm.among(sums.kept(kept, turn, walk.is_first(*program), walk.pieces))
            blocks = compute(here, valid, *(ref[...] for ref in given))
            if turn == walk.turns - 1:
                for ref, block in zip(found, blocks):
                    ref[...] = block.astype(ref.dtype).reshape(ref.shape)

        for turn in range(walk.turns):
            walk.during(turn, *program)(partial(take, turn))

    since = [0, *(max(0, walk.turns - last) for _ in operands[1:])]
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=walk.grid,
        in_specs=[walk.spec(*_place(tiles, a.shape), n) for a, n in zip(operands, since)],
        out_specs=[walk.spec(*place, walk.turns - 1) for place in results],
        scratch_shapes=[pltpu.VMEM(a.shape, a.dtype) for a in sums.all],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=walk.semantics,
            vmem_limit_bytes=needed if needed > _DEFAULT_LIMIT else None,
        ),
        interpret=norm.interpreted is not None,
        name=norm.operation,
    )(*operands)


def _result(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the devices that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual_type(x))


def _placed(parameters, blocks: Sequence[Array]) -> list[Array | None]:
    """The blocks of those parameters that are given, in their places."""
    some = iter(blocks)
    return [None if p is None else next(some) for p in parameters]


def _place(tiles: Tiles, shape: tuple[int, ...]):
    """The block of an array that broadcasts, and where it lies for an index of the tiles' grid."""
    return tiles.of(shape), lambda *index: tiles.place(shape, index)


def _partial_sums(tiles: Tiles, shape: tuple[int, ...]):
    """A parameter's derivative: a sum of its own for each block that it was broadcast over."""
    summed = tuple(1 if size > 1 else n for size, n in zip(shape, tiles.grid))

    def place(*index):
        along = (i if n > 1 else 0 for i, n in zip(index, summed))
        flat = 0
        for i, n in zip(along, summed):
            flat = flat * n + i
        return (flat, *tiles.place(shape, index))

    return (math.prod(summed), *shape), (1, *tiles.of(shape)), place


def _valid(tiles: Tiles, index) -> Array | None:
    """A mask of the block's elements inside the array; None if all of all blocks are."""
    valid = None
    for a in tiles.ragged:
        here = lax.broadcasted_iota(jnp.int32, tiles.block, a) + index[a] * tiles.block[a]
        inside = here < tiles.shape[a]
        valid = inside if valid is None else valid & inside
    return valid


def _inside(valid: Array | None, block: Array) -> Array:
    return block if valid is None else jnp.where(valid, block, jnp.zeros_like(block))
