"""The subsample of an array, in the parts in which the array lies on devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxnorm.core.moments import wide_dtype

_PARTS = 32  # equal parts of the examples, from each of which some are taken
_POSITIONS = 16  # positions of one example, at most
_LARGE = 2**20  # elements
# A wide layer gives fewer channels rather than fewer rows: a variance of fewer rows is off by a
# fifth and more, and a unit that is zero in all of them need not be dead.
_ROWS = 64
# A channel that is seldom other than zero shows that only in many rows.
_ROWS_OF_ALL_CHANNELS = 1024


@dataclass(frozen=True)
class Subsample:
    """Some elements of one array, by which the whole array is summarized.

    Attributes:
        rows: some examples, some of their positions, some of their channels. The first axis goes
            over the parts of the batch that lie on different devices, as far as types tell.
        shape: numbers of examples, positions and channels of the whole array.
        kind: name of the nonlinearity that gave the values; "" where it does not matter.
    """

    rows: Float[Array, "parts n s c"]  # float32, or float64 for float64 arrays
    shape: tuple[int, int, int]
    kind: str = ""


def subsample(
    x: Float[Array, "*shape"],
    elements: int | None,
    kind: str = "",
    feature_axes: tuple[int, ...] | None = None,
) -> Subsample:
    """Take about so many elements of an array, evenly distributed.

    Args:
        x: any floating array; examples first, channels last.
        elements: the number of elements; None for all.
        kind: as in `Subsample`.
        feature_axes: the axes of the channels, where these are not the last axis. Then all
            channels are kept, with 1024 rows or more.

    Returns:
        The subsample.
    """
    x = x if x.ndim else x.reshape(1)
    axes = [a % x.ndim for a in feature_axes or (-1,)]
    first = x.ndim - len(axes)
    if axes != list(range(first, x.ndim)):
        x = jnp.moveaxis(x, axes, range(first, x.ndim))
    n = x.shape[0] if first else 1
    s, c = math.prod(x.shape[1:first]), math.prod(x.shape[first:])
    devices = math.gcd(n, _devices(x))
    if elements is None or x.size <= elements:
        rows = x.reshape(devices, n // devices, s, c)
    else:
        # Rows of channels.
        wanted = max(_ROWS_OF_ALL_CHANNELS if feature_axes else _ROWS, elements // c)
        # The examples in equal parts, as they lie on devices: each takes of what it has.
        parts = math.lcm(math.gcd(n, _PARTS), devices)
        each = n // parts
        step = max(1, each // max(1, wanted // (parts * min(s, _POSITIONS))))
        x = every_nth(x.reshape(parts, each, *x.shape[1:]), 1, step)
        n_kept = parts * x.shape[1]
        rows = x.reshape(devices, n_kept // devices, s, c)
        rows = every_nth(rows, 2, odd_stride(s, max(1, wanted // n_kept)))
        if not feature_axes:
            rows = every_nth(rows, 3, min(c, max(1, rows.size // elements)))
    return Subsample(rows.astype(wide_dtype(x.dtype)), (n, s, c), kind)


def odd_stride(size: int, wanted: int) -> int:
    """An odd stride that keeps about so many positions, in many columns of an image."""
    step = max(1, size // wanted)
    return step if step % 2 or step == 1 else step - 1


def every_nth(x: Array, axis: int, step: int) -> Array:
    """One entry of every `step` along an axis, from the middle of each run."""
    count = x.shape[axis] // step
    if step == 1:
        return x
    if x.size < _LARGE:
        return lax.slice_in_dim(x, step // 2, count * step, step, axis)
    # A compiler for TPUs has no room for all that a strided slice steps over.
    runs = lax.slice_in_dim(x, 0, count * step, axis=axis)
    runs = runs.reshape(*x.shape[:axis], count, step, *x.shape[axis + 1 :])
    return lax.index_in_dim(runs, step // 2, axis + 1, keepdims=False)


def stack_alike(subsamples: Sequence[Subsample]) -> list[tuple[list[int], Array]]:
    """Subsamples of one shape and dtype, stacked.

    Returns:
        For each group the positions of its members in `subsamples`, and their rows, of shape
        (parts, members, n, s, c).
    """
    groups: dict[Any, list[int]] = {}
    for i, each in enumerate(subsamples):
        groups.setdefault((each.rows.shape, each.rows.dtype), []).append(i)
    return [
        (members, jnp.stack([subsamples[i].rows for i in members], 1))
        for members in groups.values()
    ]


def gather_parts(arrays: Any) -> Any:
    """Copy arrays with a leading axis of parts of the batch to all devices, in one collective.

    Args:
        arrays: a pytree. Arrays with one part are left as they are.

    Returns:
        The same pytree.
    """
    leaves, structure = jax.tree.flatten(arrays)
    sharded = [i for i, leaf in enumerate(leaves) if leaf.shape[0] > 1]
    for parts in sorted({leaves[i].shape[0] for i in sharded}):
        group = [i for i in sharded if leaves[i].shape[0] == parts]
        flat = _replicated(jnp.concatenate([leaves[i].reshape(parts, -1) for i in group], 1))
        start = 0
        for i in group:
            size = math.prod(leaves[i].shape[1:])
            chunk = flat[:, start : start + size].reshape(leaves[i].shape)
            leaves[i], start = chunk.astype(leaves[i].dtype), start + size
    return jax.tree.unflatten(structure, leaves)


def _devices(x: Array) -> int:
    """The number of devices over which the leading axis of an array may be sharded."""
    sharding = jax.typeof(x).sharding
    leading = sharding.spec[0] if x.ndim and len(sharding.spec) else None
    named = leading if isinstance(leading, tuple) else (leading,)
    mesh = sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    # Where an Auto axis has its devices, only the compiler knows.
    return math.prod(n for name, n, kind in axes if kind == AxisType.Auto or name in named)


def _replicated(x: Array) -> Array:
    """An array, whole on every device."""
    mesh = jax.typeof(x).sharding.mesh
    sharding = NamedSharding(mesh, P(*(None for _ in x.shape)))
    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, sharding)
    if AxisType.Auto in mesh.axis_types:
        x = lax.with_sharding_constraint(x, sharding)
    return x
