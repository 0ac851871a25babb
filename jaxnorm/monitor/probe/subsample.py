"""The subsample of an array that is observed, in the parts in which it lies on devices."""

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


@dataclass(frozen=True)
class Excerpt:
    """The subsample of an array that is observed."""

    rows: Float[Array, "parts n s c"]
    """Some of its examples, some of their positions, some of their channels; by the parts of the
    batch that lie on devices of their own, as far as types tell."""
    shape: tuple[int, int, int]
    """Examples, positions and channels of the whole array."""
    kind: str = ""
    """The nonlinearity whose value it is, if it is one's."""


def excerpt(
    x: Float[Array, "*shape"],
    elements: int | None,
    kind: str = "",
    feature_axes: tuple[int, ...] | None = None,
) -> Excerpt:
    """About so many elements of `x`, evenly spread.

    Args:
        x: examples first; channels last.
        elements: None for all.
        kind: see `Excerpt`.
        feature_axes: other axes of the channels, all of which are looked at, in 1024 rows at least.
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
        wanted = max(_ROWS_OF_ALL if feature_axes else _ROWS, elements // c)
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
    return Excerpt(rows.astype(wide_dtype(x.dtype)), (n, s, c), kind)


_PARTS, _POSITIONS, _LARGE = 32, 16, 2**20
# Of wide layers rather fewer channels: a variance of fewer rows is off by a fifth and more, and a
# unit that is zero for all of them need not be dead.
_ROWS = 64
_ROWS_OF_ALL = 1024  # a channel that is seldom other than zero has to be seen so


def odd_stride(size: int, wanted: int) -> int:
    """An odd stride for about so many positions, so that they lie in many columns of an image."""
    step = max(1, size // wanted)
    return step if step % 2 or step == 1 else step - 1


def every_nth(x: Array, axis: int, step: int) -> Array:
    """One of each so many entries along an axis, from the middle of each run of them."""
    count = x.shape[axis] // step
    if step == 1:
        return x
    if x.size < _LARGE:
        return lax.slice_in_dim(x, step // 2, count * step, step, axis)
    # A compiler for TPUs has no room for all that a strided slice steps over.
    runs = lax.slice_in_dim(x, 0, count * step, axis=axis)
    runs = runs.reshape(*x.shape[:axis], count, step, *x.shape[axis + 1 :])
    return lax.index_in_dim(runs, step // 2, axis + 1, keepdims=False)


def alike(excerpts: Sequence[Excerpt]) -> list[tuple[list[int], Array]]:
    """Arrays grouped by shape and dtype, each group on an axis after that of parts."""
    groups: dict[Any, list[int]] = {}
    for i, each in enumerate(excerpts):
        groups.setdefault((each.rows.shape, each.rows.dtype), []).append(i)
    return [
        (places, jnp.stack([excerpts[i].rows for i in places], 1)) for places in groups.values()
    ]


def whole(arrays: Any) -> Any:
    """Arrays with a leading axis of parts of the batch, on every device: in one collective."""
    leaves, structure = jax.tree.flatten(arrays)
    spread = [i for i, leaf in enumerate(leaves) if leaf.shape[0] > 1]
    for parts in sorted({leaves[i].shape[0] for i in spread}):
        mine = [i for i in spread if leaves[i].shape[0] == parts]
        flat = _everywhere(jnp.concatenate([leaves[i].reshape(parts, -1) for i in mine], 1))
        start = 0
        for i in mine:
            size = math.prod(leaves[i].shape[1:])
            piece = flat[:, start : start + size].reshape(leaves[i].shape)
            leaves[i], start = piece.astype(leaves[i].dtype), start + size
    return jax.tree.unflatten(structure, leaves)


def _devices(x: Array) -> int:
    """Over how many devices the leading axis of an array may be spread."""
    sharding = jax.typeof(x).sharding
    leading = sharding.spec[0] if x.ndim and len(sharding.spec) else None
    named = leading if isinstance(leading, tuple) else (leading,)
    mesh = sharding.mesh
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
    # Where an Auto axis has its devices, only the compiler knows.
    return math.prod(n for name, n, kind in axes if kind == AxisType.Auto or name in named)


def _everywhere(x: Array) -> Array:
    mesh = jax.typeof(x).sharding.mesh
    sharding = NamedSharding(mesh, P(*(None for _ in x.shape)))
    if AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, sharding)
    if AxisType.Auto in mesh.axis_types:
        x = lax.with_sharding_constraint(x, sharding)
    return x
