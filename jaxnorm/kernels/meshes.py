"""Kernels on arrays that are spread over devices.

A compiler that partitions programs cannot look into a kernel. Where types say how an array is
spread, as on a mesh with Explicit axes, each device is given its part of the slices here.
"""

from functools import partial
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from jaxnorm._jax import varying_axes
from jaxnorm.core.blocks import reshard_like, spec_of
from jaxnorm.kernels.held import Norm


def spread_along(x: Array, axes: tuple[int, ...]) -> list[str]:
    """Mesh axes over which those axes of `x` are spread, by its type."""
    spec = spec_of(x)
    return [str(spec[a]) for a in axes if spec[a] is not None]


def everywhere(
    norm: Norm, x: Array, residual: Array | None, scale: Array | None, bias: Array | None
) -> tuple[Array, ...]:
    """`operator.normalize`, on each device for the slices that it holds."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return _here(norm, x, residual, scale, bias)
    operands = [x, *(None if a is None else reshard_like(a, x) for a in (residual, scale, bias))]
    specs = [None if a is None else PartitionSpec(*spec_of(a)) for a in operands]
    run: Any = jax.shard_map(
        partial(_here, norm),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=(specs[0],) if residual is None else (specs[0], specs[0]),
    )
    return run(*operands)


def _here(norm: Norm, x: Array, *others: Array | None) -> tuple[Array, ...]:
    """Operands that all vary over the devices that any of them varies over."""
    from jaxnorm.kernels.operator import normalize  # loaded when a kernel is called, not before

    names = frozenset().union(*(varying_axes(a) for a in (x, *others) if a is not None))
    residual, scale, bias = (None if a is None else _varied(a, names) for a in others)
    return normalize(norm, _varied(x, names), residual, scale, bias)


def _varied(array: Array, names: frozenset[str]) -> Array:
    missing = tuple(sorted(names - varying_axes(array)))
    return lax.pcast(array, missing, to="varying") if missing else array
