"""Moments of slices that are spread over named axes (`vmap`, `pmap`, `shard_map`)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxnorm.core.replicas import ALONE, Alone

AxisName = str | tuple[str, ...]


@dataclass(frozen=True)
class NamedAxis(Alone):
    """All members of a named axis, or of one's group of its indices, hold parts of a slice."""

    name: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] | None = None

    def size(self) -> int:
        """Number of members that are combined."""
        return len(self.groups[0]) if self.groups else lax.axis_size(self.name)

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """Sums over the members: arrays of one shape travel as one, in one all-reduce."""
        parts = [p for a in arrays for p in _parts(a)]
        total = iter(self._over(lax.psum, jnp.stack(parts)))
        return tuple(
            lax.complex(next(total), next(total)) if jnp.iscomplexobj(a) else next(total)
            for a in arrays
        )

    def min(self, array: Array) -> Array:
        """Elementwise minimum over the members."""
        return self._over(lax.pmin, array)

    def _over(self, collective, array: Array) -> Array:
        groups = None if self.groups is None else [list(g) for g in self.groups]
        return collective(array, self.name, axis_index_groups=groups)


def _parts(array: Array) -> tuple[Array, ...]:
    return (jnp.real(array), jnp.imag(array)) if jnp.iscomplexobj(array) else (array,)


def named_axis(operation: str, axis_name: AxisName | None, axis_index_groups=None) -> Alone:
    """The replicas behind `axis_name`, which must be bound where this is traced.

    Raises:
        ValueError: the name is not bound, or groups are given without a name or of unequal size.
    """
    if axis_name is None:
        if axis_index_groups is None:
            return ALONE
        raise ValueError(
            f"{operation}: axis_index_groups names groups of indices of axis_name; got "
            f"axis_index_groups={axis_index_groups} with axis_name=None. Name the axis too, or "
            "leave both out."
        )
    names = tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)
    if not names or isinstance(axis_name, int):
        raise TypeError(
            f"{operation}: axis_name must be the name of an axis, or a tuple of names; got "
            f"axis_name={axis_name!r}. Give the name that vmap, pmap or the mesh has for it."
        )
    for name in names:
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"{operation}: axis_name={name!r} is not bound where this is traced. It is bound "
                f"inside jax.vmap(..., axis_name={name!r}), jax.pmap(..., axis_name={name!r}) and "
                f"jax.shard_map over a mesh with an axis {name!r}. Under jax.jit over sharded "
                "arrays leave axis_name=None: there the statistics are global already."
            ) from None
    groups = None
    if axis_index_groups is not None:
        groups = tuple(tuple(int(i) for i in g) for g in axis_index_groups)
        _check_groups(operation, names, groups)
    return NamedAxis(names, groups)


def _check_groups(operation: str, names: tuple[str, ...], groups: tuple[tuple[int, ...], ...]):
    size = lax.axis_size(names)
    if sorted(i for g in groups for i in g) != list(range(size)) or len(set(map(len, groups))) != 1:
        raise ValueError(
            f"{operation}: axis_index_groups must split the {size} indices of the axis into groups "
            f"of one size; got {[list(g) for g in groups]}. For example "
            f"{[list(range(size // 2)), list(range(size // 2, size))]}."
        )
    try:  # one number, to learn here what JAX would say from three layers below
        NamedAxis(names, groups).sum(lax.axis_index(names).astype(jnp.float32))
    except NotImplementedError:
        raise ValueError(
            f"{operation}: JAX does not split an axis into groups under this transformation; got "
            f"axis_index_groups={[list(g) for g in groups]} for axis_name={names}. pmap and "
            "shard_map(..., check_vma=False) do; under vmap, use two axes and name one of them."
        ) from None
