"""Kernels for TPUs: every element crosses the memory bus once in each direction.

Forward: one read of `x`, one write of `y`. Backward: one read of `x` and `dy`, one write of `dx`;
the moments are computed again from the block in VMEM, so that nothing but `x` is kept. Only a slice
that is too large for on-chip memory is read once for each sum over it, chunk by chunk.
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
from jaxnorm.kernels.block import KernelNorm
from jaxnorm.kernels.chunks import GridOrder, ListedSums
from jaxnorm.kernels.tiles import Tiles, tiles_for

# Float32 arrays of a block's size that the compiler holds beside the operands' double buffers.
_TEMPORARIES = 8
_DEFAULT_LIMIT = 16 * 2**20


def forward(norm: KernelNorm, x: Array, residual: Array | None, *parameters: Array | None):
    """`y`, and the sum of `x` and `residual` where there is one."""
    tiles = tiles_for(norm, x.shape, x.dtype)
    if tiles.cut and residual is not None:  # added once, and not in every pass
        total = x + residual
        return [*forward(norm, total, None, *parameters), total]
    large = [x] if residual is None else [x, residual]
    out = [_result(x, x.shape, norm.epilogue.dtype)]
    if residual is not None:
        out.append(_result(x, x.shape, x.dtype))

    def compute(norm: KernelNorm, valid, *blocks):
        x, *others = blocks[: len(large)]
        for other in others:
            x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
        chosen = _with_none(parameters, blocks[len(large) :])
        mask = valid if tiles.cut else None
        return [norm.block_value(tiles.shape[-1], x, *chosen, mask=mask), *(x for _ in others)]

    given = [p for p in parameters if p is not None]
    return _call(norm, tiles, compute, [*large, *given], out, last=1)


def backward(norm: KernelNorm, x: Array, parameters, dy: Array, dtotal: Array | None):
    """`dx` and the derivatives of those parameters that are given.

    `dtotal` is the cotangent of `x` itself where `x` is a result too: it is added to `dx`.
    """
    tiles = tiles_for(norm, x.shape, x.dtype)
    given = [p for p in parameters if p is not None]
    large = [x, dy] if dtotal is None else [x, dy, dtotal]
    parts = [_partial_sums(tiles, p.shape) for p in given]
    out = [_result(x, x.shape, x.dtype), *(_result(x, s, jnp.float32) for s, *_ in parts)]

    def compute(norm: KernelNorm, valid, *blocks):
        x, dy, *others = (_inside(valid, block) for block in blocks[: len(large)])
        chosen = _with_none(parameters, blocks[len(large) :])
        mask = valid if tiles.cut else None
        dx, *derived = norm.block_cotangents(tiles.shape[-1], x, dy, *chosen, mask=mask)
        for other in others:
            dx = dx + other.astype(dx.dtype)
        return [dx, *(d for d in derived if d is not None)]

    cut = [None, *(part[1:] for part in parts)]
    dx, *sums = _call(norm, tiles, compute, [*large, *given], out, cut, last=2)
    return dx, *(jnp.sum(s, axis=0).astype(p.dtype) for s, p in zip(sums, given))


def _call(
    norm: KernelNorm, tiles: Tiles, compute: Callable, operands, out, blocks=None, *, last: int
):
    """Run `compute` on every block.

    Args:
        norm: what is computed.
        tiles: the blocks.
        compute: a function of a norm, of a mask of the elements inside the array, and of blocks.
        operands: arrays that broadcast to the tiles' shape.
        out: shapes of results.
        blocks: for each result its block, and the block's index as a function of an index of the
            tiles' grid; None: it is cut like an operand.
        last: where slices are cut, the number of passes in which operands but the first are read.
    """
    cut = [b or _cut(tiles, a.shape) for b, a in zip(blocks or [None] * len(out), out)]
    bytes_of = [a.dtype.itemsize for a in (*operands, *out) if a.shape == tiles.shape]
    needed = tiles.elements * (2 * sum(bytes_of) + 4 * _TEMPORARIES)
    listed = ListedSums()
    if tiles.cut:
        examples = [jax.ShapeDtypeStruct(tiles.block_of(a.shape), a.dtype) for a in operands]
        valid = jax.ShapeDtypeStruct(tiles.block, jnp.bool_) if tiles.ragged else None
        jax.eval_shape(partial(compute, norm.with_replicas(listed)), valid, *examples)
    order = GridOrder(tiles, passes=1 + len(listed.sums))

    def body(*refs):
        given, rest = refs[: len(operands)], refs[len(operands) :]
        found, kept = rest[: len(out)], rest[len(out) :]
        program = [pl.program_id(i) for i in range(len(order.grid))]
        valid = _valid(tiles, order.index(*program))

        def run(number: int):
            this = norm
            if tiles.cut:
                first = order.is_first(*program)
                this = norm.with_replicas(listed.kept_in(kept, number, first, order.chunks))
            results = compute(this, valid, *(ref[...] for ref in given))
            if number == order.passes - 1:
                for ref, block in zip(found, results):
                    ref[...] = block.astype(ref.dtype).reshape(ref.shape)

        for number in range(order.passes):
            order.during(number, *program)(partial(run, number))

    since = [0, *(max(0, order.passes - last) for _ in operands[1:])]
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=order.grid,
        in_specs=[order.spec(*_cut(tiles, a.shape), n) for a, n in zip(operands, since)],
        out_specs=[order.spec(*block, order.passes - 1) for block in cut],
        scratch_shapes=[pltpu.VMEM(a.shape, a.dtype) for a in listed.scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=order.semantics,
            vmem_limit_bytes=needed if needed > _DEFAULT_LIMIT else None,
        ),
        interpret=norm.interpreted is not None,
        name=norm.operation,
    )(*operands)


def _result(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the devices that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual_type(x))


def _with_none(parameters, blocks: Sequence[Array]) -> list[Array | None]:
    """The blocks of those parameters that are given, and None for the others."""
    some = iter(blocks)
    return [None if p is None else next(some) for p in parameters]


def _cut(tiles: Tiles, shape: tuple[int, ...]):
    """The block of an array that broadcasts, and its index by that of the tiles' grid."""
    return tiles.block_of(shape), lambda *index: tiles.index_of(shape, index)


def _partial_sums(tiles: Tiles, shape: tuple[int, ...]):
    """A parameter's derivative: a sum of its own for each block that it was broadcast over."""
    summed = tuple(1 if size > 1 else n for size, n in zip(shape, tiles.grid))

    def index_of(*index):
        along = (i if n > 1 else 0 for i, n in zip(index, summed))
        flat = 0
        for i, n in zip(along, summed):
            flat = flat * n + i
        return (flat, *tiles.index_of(shape, index))

    return (math.prod(summed), *shape), (1, *tiles.block_of(shape)), index_of


def _valid(tiles: Tiles, index) -> Array | None:
    """A mask of the block's elements inside the array; None if no block reaches over an edge."""
    valid = None
    for a in tiles.ragged:
        here = lax.broadcasted_iota(jnp.int32, tiles.block, a) + index[a] * tiles.block[a]
        inside = here < tiles.shape[a]
        valid = inside if valid is None else valid & inside
    return valid


def _inside(valid: Array | None, block: Array) -> Array:
    return block if valid is None else jnp.where(valid, block, jnp.zeros_like(block))
