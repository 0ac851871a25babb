"""Kernels for NVIDIA GPUs: every element crosses the memory bus once in each direction.

They await a measurement. They compile for Hopper and are right in Pallas's interpreter, but they
have never run on a GPU, and they are written for Pallas's Triton backend, which JAX deprecates. So
nothing chooses them: this module is imported where `implementation="pallas"` asks for a kernel.

Forward: one read of `x`, one write of `y`. Backward: one read of `x` and `dy`, one write of `dx`;
the moments are computed again from the block in registers, so that nothing but `x` is kept.

A block holds whole slices in the registers of one program. Its sides are powers of two, as Triton
asks for; what they add to an array's own sizes is neither read nor written, nor counted. There are
no atomics, so that a derivative is the same at every run: each program sums over its blocks, and
the sums of the programs, a few hundred, are added afterwards.
"""

import math
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

from jaxnorm._jax import inner_programs
from jaxnorm.kernels.block import KernelNorm

Program = tuple[Any, Any]
"""A program's index: along the rows, and along the groups."""

DTYPES = ("float16", "bfloat16", "float32")
# Elements of a block for each thread: in the backward pass they fill the 255 registers it can have,
# and 256 threads a multiprocessor. With less for more threads, a register too many halves these.
_EACH = 32
MOST = 1024 * _EACH
"""Elements of a block at most."""
# Elements of a block of short slices: one warp's, which then needs no other for a sum; and where
# programs add something up, more, since each of them writes what it has.
SMALL, ROOM = 2**10, 2**12
# Elements on one multiprocessor that there are registers for; a larger block lies there alone, and
# its program must load one while it computes another.
ROOMY = 2**13
MULTIPROCESSORS = 132  # of an H100
_SECTOR = 32  # bytes that memory moves at once
# Elementwise functions of JAX that Pallas has no Triton for.
_UNKNOWN = {"bessel_i0e", "bessel_i1e", "digamma", "erf", "erfc", "igamma", "lgamma", "round"}


def refusal(norm: KernelNorm, shape: tuple[int, ...], dtype, parameter_shapes=()) -> str | None:
    """Why a call of that shape, with parameters of those shapes, has no kernel; None: it has."""
    for what, given in (("x", dtype), ("the result", norm.finish.dtype)):
        if jnp.dtype(given).name not in DTYPES:
            return f"GPU kernels compute in float32, and {what} is {jnp.dtype(given).name}"
    if not all(isinstance(size, int) and size > 0 for size in shape):
        return f"GPU kernels need positive sizes that are known when traced, and x has {shape}"
    if norm.finish.activation is not None:
        unknown = _UNKNOWN.intersection(_operations(jax.make_jaxpr(norm.finish.activation)(1.0)))
        if unknown:
            return f"GPU kernels have no {' or '.join(sorted(unknown))}, as in the activation"
    first, last = _span(norm)
    if tuple(sorted(norm.axes)) != tuple(range(first, last)):
        return f"GPU kernels reduce neighbouring axes, and these are {norm.axes}"
    if norm.split_axes and not (last,) == norm.split_axes == (len(shape) - 1,):
        return f"GPU kernels split the last axis into groups, and this one is {norm.split_axes[0]}"
    plan = plan_of(norm, shape, dtype, ())
    for given in parameter_shapes:
        pairs = zip(given[first:], plan.trailing)
        if _samples(shape[:first], given) is None or any(n not in (1, m) for n, m in pairs):
            return f"GPU kernels take parameters for each feature or sample, and got {given}"
    if math.prod(plan.block) > MOST:
        sides = " x ".join(map(str, plan.block))
        return f"a block of such slices, {sides}, has more elements than the {MOST} of registers"
    run = plan.block[2] * plan.block[3] * jnp.dtype(dtype).itemsize
    if run < _SECTOR and plan.block[2] < plan.view[2]:
        return f"only {run} bytes of a block of such slices would be neighbours in memory"
    return None


def forward(norm: KernelNorm, x: Array, residual: Array | None, *parameters: Array | None):
    """`y`, and the sum of `x` and `residual` where there is one."""
    given = [p for p in parameters if p is not None]
    plan = plan_of(norm, x.shape, x.dtype, [p.shape for p in given])
    large = [x] if residual is None else [x, residual]
    out = [jax.ShapeDtypeStruct(plan.view, norm.finish.dtype)]
    if residual is not None:
        out.append(jax.ShapeDtypeStruct(plan.view, x.dtype))
    bare = plan.norm.without_epilogue()

    def body(*refs):
        operands, results = refs[: -len(out)], refs[-len(out) :]
        program = pl.program_id(0), pl.program_id(1)  # not in a loop: the interpreter cannot

        def step(at, blocks, carry):
            x, *residuals = blocks
            for other in residuals:
                x = (x.astype(jnp.float32) + other.astype(jnp.float32)).astype(x.dtype)
                at.store(results[1], x)
            xhat = bare.block_value(0, x, None, None)
            # Only now, so that while the moments are taken their registers hold more rows.
            chosen = plan.load(program, operands[len(large) :], parameters)
            at.store(results[0], norm.finish(xhat, *chosen))
            return carry

        plan.for_each_block(program, operands[: len(large)], step, [])

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
        program = pl.program_id(0), pl.program_id(1)
        chosen = plan.load(program, operands[len(large) :], parameters)
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
        sums = plan.for_each_block(program, operands[: len(large)], step, sums)
        for ref, total in zip(results[1:], sums):
            total = total if shape[0] == 1 else jnp.sum(total, 0, keepdims=True)
            plan.features_at(program, program[0]).store(ref, total)

    dx, *sums = _call(plan, body, large, given, out)
    return dx.reshape(x.shape), *(plan.collected(s, p) for s, p in zip(sums, given))


def _call(plan: "GpuPlan", body, large, given, out):
    """Run the body in every program; it finds its blocks in the whole arrays."""
    operands = [*(a.reshape(plan.view) for a in large), *map(plan.by_sample, given)]
    return pl.pallas_call(
        body,
        out_shape=out,
        grid=(plan.programs, pl.cdiv(plan.view[2], plan.block[2])),
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
    """Which of its lines a cache gives up first: those that nobody reads again."""
    positions: int | None = None
    """How many there are, where a block was filled up with more: they are not in `inside`."""

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
        """Zero where positions are repeated, for what is summed over them."""
        here = self._positions()
        return jnp.where(here[0], block, jnp.zeros_like(block)) if here else block

    def store(self, ref, block: Array) -> None:
        """Write what lies inside."""
        inside = [] if self.inside is None else [self.inside]
        mask = _all(inside + self._positions())
        plgpu.store(ref.at[self.index], block.astype(ref.dtype), mask=mask)

    def _positions(self) -> list[Array]:
        return [] if self.positions is None else [self.index[1] < self.positions]


@dataclass(frozen=True)
class GpuPlan:
    """The distribution of an array's slices over programs.

    The array is seen as (rows, positions, groups, members). A slice is all positions and members of
    a row and a group. For slices over trailing axes these are all members, of one group; channels
    of an image are groups, and its pixels positions.
    """

    norm: KernelNorm
    """For one block."""
    lead: int
    """How many axes of the array are rows."""
    trailing: tuple[int, ...]
    """Sizes of the axes that may carry parameters, which are groups and members."""
    view: tuple[int, int, int, int]
    block: tuple[int, int, int, int]
    samples: int
    """Ranges of consecutive rows that have parameters of their own."""
    programs: int
    """Along the rows; a multiple of the samples."""

    @property
    def rows(self) -> int:
        """Rows of a sample."""
        return self.view[0] // self.samples

    @property
    def each(self) -> int:
        """The number of programs that share a sample."""
        return self.programs // self.samples

    @property
    def steps(self) -> int:
        """The number of blocks of a program."""
        return pl.cdiv(self.rows, self.block[0] * self.each)

    @property
    def warps(self) -> int:
        """The number of warps of a program."""
        return min(max(math.prod(self.block) // (32 * _EACH), 1), 32)

    def for_each_block(self, program: Program, refs, step: Callable, carry):
        """Do ``step(address, blocks, carry)`` for one block after the other.

        A block is loaded while the one before it is computed.
        """

        def load(i):
            at = self.address(program, i)
            return [at.load(ref) for ref in refs]

        def body(i, state):
            blocks, carry = state
            following = load(i + 1)
            return following, step(self.address(program, i), blocks, carry)

        if self.steps == 1:
            return step(self.address(program, 0), load(0), carry)
        return lax.fori_loop(0, self.steps, body, (load(0), carry))[1]

    def address(self, program: Program, step) -> BlockAddress:
        """A program's block; neighbouring programs have neighbouring blocks."""
        first = (step * self.each + lax.rem(program[0], self.each)) * self.block[0]
        row = first + self._along(0)
        # What a program would load after its last block lies outside.
        whole = self.steps == 1 and self.rows % (self.block[0] * self.each) == 0
        inside = [] if whole else [row < self.rows]
        row = row + lax.div(program[0], self.each) * self.rows
        positions = self.view[1] if self.view[1] < self.block[1] else None
        group, member, others = self._features(program)
        index = (row, self._along(1), group, member)
        return BlockAddress(index, _all(inside + others), "evict_first", positions)

    def features_at(self, program: Program, row) -> BlockAddress:
        """The block of that row of a parameter."""
        group, member, inside = self._features(program)
        return BlockAddress((row, group, member), _all(inside), "evict_last")

    def load(self, program: Program, refs, parameters) -> list[Array | None]:
        """The blocks of those parameters that are given, and None for the others."""
        rows = (lax.div(program[0], self.programs // ref.shape[0]) for ref in refs)
        blocks = iter([self.features_at(program, row).load(ref) for row, ref in zip(rows, refs)])
        return [None if p is None else next(blocks) for p in parameters]

    def by_sample(self, parameter: Array) -> Array:
        """A parameter as (samples, groups, members)."""
        whole = (*parameter.shape[: self.lead], *self.trailing)
        return jnp.broadcast_to(parameter, whole).reshape(-1, *self.view[2:])

    def collected(self, sums: Array, parameter: Array) -> Array:
        """A parameter's derivative from the programs' sums."""
        before = parameter.shape[: self.lead]
        total = jnp.sum(sums.reshape(math.prod(before), -1, math.prod(self.trailing)), 1)
        total = total.reshape(*before, *self.trailing)
        shared = tuple(a for a, n in enumerate(total.shape) if n > parameter.shape[a])
        return jnp.sum(total, shared, keepdims=True).astype(parameter.dtype)

    def _along(self, axis: int) -> Array:
        shape = [n if a == axis else 1 for a, n in enumerate(self.block)]
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def _features(self, program: Program):
        group = program[1] * self.block[2] + self._along(2)
        member = self._along(3)
        inside = [group < self.view[2]] if self.view[2] % self.block[2] else []
        if self.view[3] < self.block[3]:
            inside.append(member < self.view[3])
        return group, member, inside


def plan_of(
    norm: KernelNorm, shape: tuple[int, ...], dtype, given, *, sums: bool = False
) -> GpuPlan:
    """The blocks of a call of that shape, with parameters of the shapes `given`.

    Where programs add something up (`sums`), fewer of them do more.
    """
    first, last = _span(norm)
    before, reduced, after = shape[:first], math.prod(shape[first:last]), shape[last:]
    if norm.split_axes:
        view = (math.prod(before), reduced, norm.groups, math.prod(after) // norm.groups)
    elif after:
        view = (math.prod(before), reduced, math.prod(after), 1)
    else:
        view = (math.prod(before), 1, 1, reduced)
    trailing = (*[1] * (last - first), *after) if after else shape[first:]
    samples = max((_samples(before, s) or 1 for s in given), default=1)
    block = _block(view, samples, jnp.dtype(dtype).itemsize, ROOM if sums else SMALL)
    axes = (1, 3) if block[1] > 1 else (3,)
    norm = norm.with_padded_slices(axes, tuple(view[a] for a in axes))
    each, elements = pl.cdiv(view[0] // samples, block[0]), math.prod(block)
    if sums or elements > ROOMY:
        columns = samples * pl.cdiv(view[2], block[2])
        resident = MULTIPROCESSORS * max(1, ROOMY // elements)
        each = pl.cdiv(each, pl.cdiv(each, max(1, resident // columns)))
    return GpuPlan(norm, first, trailing, view, block, samples, samples * each)


def _block(view: tuple[int, int, int, int], samples: int, itemsize: int, room: int):
    """Sides of a block: whole slices, in groups that are neighbours in memory, of several rows."""
    rows, positions, groups, members = view
    sides = [1, pl.next_power_of_2(positions), 1, pl.next_power_of_2(members)]
    while sides[2] < groups:
        scattered = sides[2] * members * itemsize < 2 * _SECTOR
        if 2 * math.prod(sides) > (MOST if scattered else room):
            break
        sides[2] *= 2
    fits = max(1, room // math.prod(sides))
    return min(fits, pl.next_power_of_2(rows // samples)), sides[1], sides[2], sides[3]


def _span(norm: KernelNorm) -> tuple[int, int]:
    """The first reduced axis, and the one behind the last."""
    if norm.axes or not norm.split_axes:
        return min(norm.axes), max(norm.axes) + 1
    (axis,) = norm.split_axes
    return axis, axis


def _samples(before: tuple[int, ...], given: tuple[int, ...]) -> int | None:
    """The number of rows of a parameter; None where they do not follow each other."""
    own = max((a + 1 for a, size in enumerate(given[: len(before)]) if size > 1), default=0)
    return math.prod(before[:own]) if given[:own] == before[:own] else None


def _operations(jaxpr) -> set[str]:
    """Names of what a program is made of."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    inner = (_operations(j) for e in jaxpr.eqns for j in inner_programs(e))
    return found.union(*inner)


def _all(conditions: Sequence[Array]) -> Array | None:
    """The conjunction of masks of a block; None where there is no mask."""
    return reduce(operator.and_, conditions) if conditions else None
