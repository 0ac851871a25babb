"""Kernels for NVIDIA GPUs: every element crosses the memory bus once in each direction.

They await a measurement. They compile for Hopper and are right in Pallas's interpreter, but they
have never run on a GPU, and they are written for Pallas's Triton backend, which JAX deprecates. So
nothing chooses them: this module is imported where `implementation="pallas"` asks for a kernel and
the program is lowered for a GPU.

Forward: one read of `x`, one write of `y`. Backward: one read of `x` and `dy`, one write of `dx`;
the moments are computed again from the block in registers, so that nothing but `x` is kept.

A block holds whole slices in the registers of one program. Its sides are powers of two, as Triton
asks for; what they add to an array's own sizes is neither read nor written, nor counted. There are
no atomics, so that a derivative is the same at every run: each program sums over its blocks, and
the sums of the programs, a few hundred, are added afterwards.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from jaxnorm.kernels.block import KernelNorm
from jaxnorm.kernels.gpu_plan import GpuPlan, plan_of


def forward(norm: KernelNorm, x: Array, residual: Array | None, *parameters: Array | None):
    """`y`, and the sum of `x` and `residual` where there is one."""
    given = [p for p in parameters if p is not None]
    plan = plan_of(norm, x.shape, x.dtype, [p.shape for p in given])
    large = [x] if residual is None else [x, residual]
    out = [jax.ShapeDtypeStruct(plan.view, norm.epilogue.dtype)]
    if residual is not None:
        out.append(jax.ShapeDtypeStruct(plan.view, x.dtype))
    bare = plan.norm.without_epilogue()

    def body(*refs):
        operands, results = refs[: -len(out)], refs[-len(out) :]
        program = _this_program(plan)

        def step(at, blocks, carry):
            x, *residuals = blocks
            for other in residuals:
                x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
                at.store(results[1], x)
            xhat = bare.block_value(0, x, None, None)
            # Only now, so that while the moments are taken their registers hold more rows.
            chosen = program.load(operands[len(large) :], parameters)
            at.store(results[0], norm.epilogue(xhat, *chosen))
            return carry

        program.for_each_block(operands[: len(large)], step, [])

    return [a.reshape(x.shape) for a in _call(plan, body, large, given, out)]


def backward(norm: KernelNorm, x: Array, parameters, dy: Array, dtotal: Array | None):
    """`dx` and the derivatives of those parameters that are given.

    `dtotal` is the cotangent of `x` itself where `x` is a result too: it is added to `dx`.
    """
    given = [p for p in parameters if p is not None]
    plan = plan_of(norm, x.shape, x.dtype, [p.shape for p in given], sums=True)
    large = [x, dy] if dtotal is None else [x, dy, dtotal]
    part = jax.ShapeDtypeStruct((plan.programs, *plan.view[2:]), jnp.float32)
    out = [jax.ShapeDtypeStruct(plan.view, x.dtype), *(part for _ in given)]

    def body(*refs):
        operands, results = refs[: -len(out)], refs[-len(out) :]
        program = _this_program(plan)
        chosen = program.load(operands[len(large) :], parameters)
        # One for each row of a block: to sum over those once, at the end, is enough.
        shape = (plan.block[0], 1, *plan.block[2:])
        chosen = [None if p is None else jnp.broadcast_to(p, shape) for p in chosen]

        def step(at, blocks, sums):
            x, dy, *cotangents = blocks
            dx, *derived = plan.norm.block_cotangents(0, x, at.counted(dy), *chosen)
            if dtotal is not None:
                dx = dx + cotangents[0].astype(dx.dtype)
            at.store(results[0], dx)
            return [s + d for s, d in zip(sums, (d for d in derived if d is not None))]

        sums = [jnp.zeros(shape, jnp.float32) for _ in given]
        sums = program.for_each_block(operands[: len(large)], step, sums)
        for ref, total in zip(results[1:], sums):
            total = total if shape[0] == 1 else jnp.sum(total, 0, keepdims=True)
            program.features_at(program.row).store(ref, total)

    dx, *sums = _call(plan, body, large, given, out)
    return dx.reshape(x.shape), *(plan.collected(s, p) for s, p in zip(sums, given))


def _call(plan: GpuPlan, body, large, given, out):
    """Run the body in every program; it finds its blocks in the whole arrays."""
    operands = [*(a.reshape(plan.view) for a in large), *map(plan.by_sample, given)]
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(plan.programs, plan.columns),
        compiler_params=plgpu.CompilerParams(num_warps=plan.warps, num_stages=1),
        interpret=plan.norm.interpreted is not None,
        name=plan.norm.operation,
    )(*operands)


@dataclass(frozen=True)
class BlockAddress:
    """The elements of a block in an array: an index for each axis, and which lie inside."""

    index: tuple[Any, ...]
    inside: Array | None
    eviction: str
    """The cache's policy: lines that nobody reads a second time are evicted first."""
    positions: int | None = None
    """Their number, where a block is padded with more; what is added is not in `inside`."""

    def load(self, ref) -> Array:
        """The block, zero where it reaches over the edge; of positions the last is repeated.

        With zeros there, far from the others, xhat could be infinite, and 0 times it a NaN.
        """
        index, other = self.index, None if self.inside is None else 0
        if self.positions is not None:
            index = (index[0], jnp.minimum(index[1], self.positions - 1), *index[2:])
        return plgpu.load(
            ref.at[index], mask=self.inside, other=other, eviction_policy=self.eviction
        )

    def counted(self, block: Array) -> Array:
        """The block with zero where positions are repeated, so that sums over it are right."""
        here = self._positions()
        return jnp.where(here[0], block, jnp.zeros_like(block)) if here else block

    def store(self, ref, block: Array) -> None:
        """Write the elements inside the array."""
        inside = [] if self.inside is None else [self.inside]
        mask = _all(inside + self._positions())
        plgpu.store(ref.at[self.index], block.astype(ref.dtype), mask=mask)

    def _positions(self) -> list[Array]:
        return [] if self.positions is None else [self.index[1] < self.positions]


@dataclass(frozen=True)
class GpuProgram:
    """One program of a kernel, which knows the blocks that are its own."""

    plan: GpuPlan
    row: Any
    """Its index along the rows."""
    column: Any
    """Its index along the groups."""

    def for_each_block(self, refs, step: Callable, carry):
        """Do ``step(address, blocks, carry)`` for one block after the other.

        A block is loaded while the one before it is computed.
        """

        def load(i):
            at = self.address(i)
            return [at.load(ref) for ref in refs]

        def body(i, state):
            blocks, carry = state
            following = load(i + 1)
            return following, step(self.address(i), blocks, carry)

        if self.plan.steps == 1:
            return step(self.address(0), load(0), carry)
        return lax.fori_loop(0, self.plan.steps, body, (load(0), carry))[1]

    def address(self, step) -> BlockAddress:
        """A program's block; neighbouring programs have neighbouring blocks."""
        first = (step * self.plan.each + lax.rem(self.row, self.plan.each)) * self.plan.block[0]
        row = first + self._along(0)
        # What a program would load after its last block lies outside.
        whole = self.plan.steps == 1 and self.plan.rows % (self.plan.block[0] * self.plan.each) == 0
        inside = [] if whole else [row < self.plan.rows]
        row = row + lax.div(self.row, self.plan.each) * self.plan.rows
        positions = self.plan.view[1] if self.plan.view[1] < self.plan.block[1] else None
        group, member, others = self._features()
        index = (row, self._along(1), group, member)
        return BlockAddress(index, _all(inside + others), "evict_first", positions)

    def features_at(self, row) -> BlockAddress:
        """The block of that row of a parameter."""
        group, member, inside = self._features()
        return BlockAddress((row, group, member), _all(inside), "evict_last")

    def load(self, refs, parameters) -> list[Array | None]:
        """The blocks of those parameters that are given, and None for the others."""
        rows = (lax.div(self.row, self.plan.programs // ref.shape[0]) for ref in refs)
        blocks = iter([self.features_at(row).load(ref) for row, ref in zip(rows, refs)])
        return [None if p is None else next(blocks) for p in parameters]

    def _along(self, axis: int) -> Array:
        shape = [n if a == axis else 1 for a, n in enumerate(self.plan.block)]
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def _features(self):
        group = self.column * self.plan.block[2] + self._along(2)
        member = self._along(3)
        inside = [group < self.plan.view[2]] if self.plan.view[2] % self.plan.block[2] else []
        if self.plan.view[3] < self.plan.block[3]:
            inside.append(member < self.plan.view[3])
        return group, member, inside


def _this_program(plan: GpuPlan) -> GpuProgram:
    # Not asked for in a loop, where Pallas's interpreter cannot answer.
    return GpuProgram(plan, pl.program_id(0), pl.program_id(1))


def _all(conditions: Sequence[Array]) -> Array | None:
    """The conjunction of masks of a block; None where there is no mask."""
    return reduce(operator.and_, conditions) if conditions else None
