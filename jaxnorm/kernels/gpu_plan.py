"""Plan of a GPU's kernel: which program takes which part of an array, or why there is none.

Nothing here needs Pallas, so that a call can be refused without importing it. The kernels which
follow the plan are in `gpu`.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxnorm._jax import inner_programs
from jaxnorm.kernels.block import KernelNorm

DTYPES = ("float16", "bfloat16", "float32")
# Elements of a block for each thread: in the backward pass they fill the 255 registers it can have,
# and 256 threads a multiprocessor. With less for more threads, a register too many halves these.
_EACH = 32
MOST = 1024 * _EACH
"""Elements of a block at most."""
# Elements of a block of short slices: one warp's, which then needs no other for a sum; and where
# programs add something up, more, since each of them writes what it has.
SMALL, ROOM = 2**10, 2**12
# Elements on one multiprocessor that there are registers for; a larger block is alone there, and
# its program must load one while it computes another.
ROOMY = 2**13
MULTIPROCESSORS = 132  # of an H100
_SECTOR = 32  # bytes that memory moves at once
# Elementwise functions of JAX that Pallas has no Triton for.
_UNKNOWN = {"bessel_i0e", "bessel_i1e", "digamma", "erf", "erfc", "igamma", "lgamma", "round"}


def refusal(norm: KernelNorm, shape: tuple[int, ...], dtype, parameter_shapes=()) -> str | None:
    """Reason why a call with arrays of these shapes has no kernel on GPUs; None if it has one."""
    for what, given in (("x", dtype), ("the result", norm.epilogue.dtype)):
        if jnp.dtype(given).name not in DTYPES:
            return f"GPU kernels compute in float32, and {what} is {jnp.dtype(given).name}"
    if not all(isinstance(size, int) and size > 0 for size in shape):
        return f"GPU kernels need positive sizes that are known when traced, and x has {shape}"
    if norm.epilogue.activation is not None:
        unknown = _UNKNOWN.intersection(_operations(jax.make_jaxpr(norm.epilogue.activation)(1.0)))
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
        return _quotient(self.rows, self.block[0] * self.each)

    @property
    def warps(self) -> int:
        """The number of warps of a program."""
        return min(max(math.prod(self.block) // (32 * _EACH), 1), 32)

    @property
    def columns(self) -> int:
        """The number of programs along the groups."""
        return _quotient(self.view[2], self.block[2])

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
    each, elements = _quotient(view[0] // samples, block[0]), math.prod(block)
    if sums or elements > ROOMY:
        columns = samples * _quotient(view[2], block[2])
        resident = MULTIPROCESSORS * max(1, ROOMY // elements)
        each = _quotient(each, _quotient(each, max(1, resident // columns)))
    return GpuPlan(norm, first, trailing, view, block, samples, samples * each)


def _block(view: tuple[int, int, int, int], samples: int, itemsize: int, room: int):
    """Sides of a block: whole slices, in groups that are neighbours in memory, of several rows."""
    rows, positions, groups, members = view
    sides = [1, _power_of_2(positions), 1, _power_of_2(members)]
    while sides[2] < groups:
        scattered = sides[2] * members * itemsize < 2 * _SECTOR
        if 2 * math.prod(sides) > (MOST if scattered else room):
            break
        sides[2] *= 2
    fits = max(1, room // math.prod(sides))
    return min(fits, _power_of_2(rows // samples)), sides[1], sides[2], sides[3]


def _span(norm: KernelNorm) -> tuple[int, int]:
    """The first reduced axis, and the one after the last."""
    if norm.axes or not norm.split_axes:
        return min(norm.axes), max(norm.axes) + 1
    (axis,) = norm.split_axes
    return axis, axis


def _samples(before: tuple[int, ...], given: tuple[int, ...]) -> int | None:
    """The number of rows of a parameter; None where they do not follow each other."""
    own = max((a + 1 for a, size in enumerate(given[: len(before)]) if size > 1), default=0)
    return math.prod(before[:own]) if given[:own] == before[:own] else None


def _operations(jaxpr) -> set[str]:
    """Names of a program's primitives, inner programs included."""
    found = {equation.primitive.name for equation in jaxpr.eqns}
    inner = (_operations(j) for e in jaxpr.eqns for j in inner_programs(e))
    return found.union(*inner)


def _quotient(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def _power_of_2(number: int) -> int:
    """The next power of two, or the number itself if it is one."""
    return 1 << (number - 1).bit_length()
