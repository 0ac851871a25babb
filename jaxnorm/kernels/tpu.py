"""Kernels for TPUs: every element crosses the memory bus once in each direction.

Forward: one read of `x`, one write of `y`. Backward: one read of `x` and `dy`, one write of `dx`;
the moments are computed again from the block at hand, so that nothing but `x` is kept.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxnorm.kernels.held import Norm
from jaxnorm.kernels.tiles import MOST, Tiles

# Float32 arrays of a block's size that the compiler holds beside the operands' double buffers.
_TEMPORARIES = 8
_DEFAULT_LIMIT = 16 * 2**20


def refusal(norm: Norm, shape: tuple[int, ...], dtype, parameter_shapes=()) -> str | None:
    """Why a call of that shape has no kernel; None: it has."""
    del parameter_shapes  # all that broadcast are taken
    room = norm.tiles(shape, dtype).elements
    return None if room <= MOST else f"a slice fills {room} elements of on-chip memory, over {MOST}"


def forward(norm: Norm, x: Array, residual: Array | None, *parameters: Array | None):
    """`y`, and the sum of `x` and `residual` where there is one."""
    tiles = norm.tiles(x.shape, x.dtype)
    large = [x] if residual is None else [x, residual]
    given = [p for p in parameters if p is not None]
    out = [_result(x, x.shape, norm.finish.dtype)]
    if residual is not None:
        out.append(_result(x, x.shape, x.dtype))

    def body(*refs):
        *operands, y_ref = refs if residual is None else refs[:-1]
        x = operands[0][...]
        if residual is not None:
            x = (x.astype(jnp.float32) + operands[1][...].astype(jnp.float32)).astype(x.dtype)
            refs[-1][...] = x
        some = iter(operands[len(large) :])
        chosen = [None if p is None else next(some)[...] for p in parameters]
        y_ref[...] = norm.held(tiles.shape[-1], x, *chosen)

    return _call(norm, tiles, body, [*large, *given], out)


def backward(norm: Norm, x: Array, parameters, dy: Array, dtotal: Array | None):
    """`dx` and the derivatives of those parameters that are given.

    `dtotal` is the cotangent of `x` itself where `x` is a result too: it is added to `dx`.
    """
    tiles = norm.tiles(x.shape, x.dtype)
    given = [p for p in parameters if p is not None]
    large = [x, dy] if dtotal is None else [x, dy, dtotal]
    parts = [_partial_sums(tiles, p.shape) for p in given]
    out = [_result(x, x.shape, x.dtype), *(_result(x, s, jnp.float32) for s, _ in parts)]

    def body(*refs):
        operands, results = refs[: len(large) + len(given)], refs[len(large) + len(given) :]
        valid = _valid(tiles)
        x, *cotangents = (_inside(valid, ref[...]) for ref in operands[: len(large)])
        some = iter(operands[len(large) :])
        chosen = [None if p is None else next(some)[...] for p in parameters]
        dx, *dparameters = norm.pulled_back(tiles.shape[-1], x, cotangents[0], *chosen)
        if dtotal is not None:
            dx = dx + cotangents[1].astype(dx.dtype)
        results[0][...] = dx.astype(results[0].dtype)
        for ref, part in zip(results[1:], (d for d in dparameters if d is not None)):
            ref[0] = part

    blocks = [None, *(spec for _, spec in parts)]
    dx, *sums = _call(norm, tiles, body, [*large, *given], out, blocks)
    return dx, *(jnp.sum(s, axis=0).astype(p.dtype) for s, p in zip(sums, given))


def _call(norm: Norm, tiles: Tiles, body, operands, out, out_specs=None):
    """Run the body on every block; a result without a block of its own is cut like an operand."""
    results = out_specs or [None] * len(out)
    bytes_of = [a.dtype.itemsize for a in (*operands, *out) if a.shape == tiles.shape]
    needed = tiles.elements * (2 * sum(bytes_of) + 4 * _TEMPORARIES)
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=tiles.grid,
        in_specs=[_block(tiles, a.shape) for a in operands],
        out_specs=[spec or _block(tiles, a.shape) for spec, a in zip(results, out)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * len(tiles.shape),
            vmem_limit_bytes=needed if needed > _DEFAULT_LIMIT else None,
        ),
        interpret=norm.interpreted is not None,
        name=norm.operation,
    )(*operands)


def _result(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """A result that varies over the devices that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).mat)


def _block(tiles: Tiles, shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec(tiles.of(shape), lambda *index: tiles.place(shape, index))


def _partial_sums(tiles: Tiles, shape: tuple[int, ...]):
    """A parameter's derivative: a sum of its own for each block that it was broadcast over."""
    summed = tuple(1 if size > 1 else n for size, n in zip(shape, tiles.grid))

    def place(*index):
        along = (i if n > 1 else 0 for i, n in zip(index, summed))
        flat = 0
        for i, n in zip(along, summed):
            flat = flat * n + i
        return (flat, *tiles.place(shape, index))

    return (math.prod(summed), *shape), pl.BlockSpec((1, *tiles.of(shape)), place)


def _valid(tiles: Tiles) -> Array | None:
    """Which elements of this block lie inside the array; None: all blocks do."""
    valid = None
    for a in tiles.ragged:
        here = lax.broadcasted_iota(jnp.int32, tiles.block, a) + pl.program_id(a) * tiles.block[a]
        inside = here < tiles.shape[a]
        valid = inside if valid is None else valid & inside
    return valid


def _inside(valid: Array | None, block: Array) -> Array:
    return block if valid is None else jnp.where(valid, block, jnp.zeros_like(block))
