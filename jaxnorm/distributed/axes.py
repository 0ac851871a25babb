"""Moments of slices that are sharded over named axes (`vmap`, `pmap`, `shard_map`)."""

import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxnorm._jax import varying_axes
from jaxnorm.core.replicas import SINGLE, Replicas

AxisName = str | tuple[str, ...]


@dataclass(frozen=True)
class NamedAxis(Replicas):
    """Replicas along a named axis, or along several; each holds a part of every slice."""

    name: tuple[str, ...]
    members: int
    """The number of indices of the axis. It is stored, because rules of differentiation run where
    the axis may have lost its name."""
    mapped: bool = False

    def size(self) -> int | Array:
        """The number of replicas that are combined."""
        return self.members

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """Sums over the replicas; arrays of one shape are stacked and sent in one collective."""
        parts = [p for a in arrays for p in _parts(a)]
        total = iter(self._sum(jnp.stack(parts)))
        return tuple(
            lax.complex(next(total), next(total)) if jnp.iscomplexobj(a) else next(total)
            for a in arrays
        )

    def min(self, array: Array) -> Array:
        """Elementwise minimum over the replicas."""
        return lax.pmin(array, self.name)

    def _sum(self, array: Array) -> Array:
        return lax.psum(array, self.name)


@dataclass(frozen=True)
class Groups(NamedAxis):
    """Replicas in groups of equal size, on mesh axes, where XLA has a collective within groups."""

    groups: tuple[tuple[int, ...], ...] = ()

    def size(self) -> int | Array:
        """The number of replicas in each group."""
        return len(self.groups[0])

    def min(self, array: Array) -> Array:
        """Elementwise minimum over the group."""
        return lax.pmin(array, self.name, axis_index_groups=self._lists)

    def _sum(self, array: Array) -> Array:
        if not _varies(self.name):
            return lax.psum(array, self.name, axis_index_groups=self._lists)
        # With check_vma=True JAX has no sum within groups, because its result varies over the axis.
        return jnp.sum(lax.all_gather(array, self.name, axis_index_groups=self._lists), 0)

    @property
    def _lists(self) -> list[list[int]]:
        return [list(group) for group in self.groups]


@dataclass(frozen=True)
class AnyGroups(Groups):
    """Replicas in groups of any sizes, over any named axes.

    `vmap` has no collective within groups. So every replica gathers the arrays of all replicas and
    combines those of its own group.
    """

    def size(self) -> Array:
        """The number of replicas in this replica's group."""
        return jnp.sum(self._mine())

    def min(self, array: Array) -> Array:
        """Elementwise minimum over the group."""
        gathered = self._gathered(array)
        return jnp.min(jnp.where(self._mine(gathered.ndim), gathered, jnp.inf), 0)

    def agreed(self, condition: Array) -> Array:
        """A condition that is true only if it is true in all groups.

        All groups take part in the collective that follows the condition, so they must decide
        alike.
        """
        return lax.pmin(condition.astype(jnp.int32), self.name) > 0

    def _sum(self, array: Array) -> Array:
        gathered = self._gathered(array)
        return jnp.sum(jnp.where(self._mine(gathered.ndim), gathered, 0), 0)

    def _gathered(self, array: Array) -> Array:
        shape = array.shape
        for name in reversed(self.name):
            array = lax.all_gather(array, name)
        return array.reshape(-1, *shape)

    def _mine(self, ndim: int = 1) -> Array:
        """A mask, along axis 0, of the replicas in the group of this replica."""
        of = np.empty(sum(map(len, self.groups)), np.int32)
        for number, group in enumerate(self.groups):
            of[list(group)] = number
        mine = jnp.asarray(of) == jnp.asarray(of)[lax.axis_index(self.name)]
        return mine.reshape(-1, *[1] * (ndim - 1))


def _parts(array: Array) -> tuple[Array, ...]:
    return (jnp.real(array), jnp.imag(array)) if jnp.iscomplexobj(array) else (array,)


def _varies(name: tuple[str, ...]) -> bool:
    """True if values that differ along the axis have a type that says so (check_vma=True)."""
    return bool(varying_axes(lax.axis_index(name)))


def named_axis(operation: str, axis_name: AxisName | None, axis_index_groups=None) -> Replicas:
    """The replicas along `axis_name`, which must be bound where this is traced.

    Raises:
        ValueError: the name is not bound, or groups are given without a name or do not split the
            axis.
    """
    if axis_name is None:
        if axis_index_groups is None:
            return SINGLE
        raise ValueError(
            f"{operation}: axis_index_groups names groups of indices of axis_name; got "
            f"axis_index_groups={axis_index_groups} with axis_name=None. Name the axis too, or "
            "leave both out."
        )
    names = _bound(operation, axis_name)
    all_replicas = NamedAxis(names, lax.axis_size(names), mapped=not _on_mesh(names))
    if axis_index_groups is None:
        return all_replicas
    return grouped(all_replicas, _checked(operation, all_replicas, axis_index_groups))


def is_bound(axis_name: AxisName | None) -> bool:
    """True if all names are bound where this is traced; False if no name is given."""
    names = _names(axis_name)
    try:
        return axis_name is not None and lax.axis_size(names) > 0
    except NameError:
        return False


def check_synchronized(operation: str, x: Array, mean: Array, axis_name: AxisName | None) -> None:
    """Raise if a batch is sharded over devices and no argument says how to combine its statistics.

    The types of the arrays tell this with check_vma=True. If the running mean differs between
    devices too, the axis is taken to carry features, or independent runs.
    """
    names = _names(axis_name)
    missing = sorted(varying_axes(x) - varying_axes(mean) - set(names))
    if missing:
        raise ValueError(
            f"{operation}: a batch that is sharded over devices is normalized over all of them, or "
            f"its arguments say otherwise; got x that varies over {missing} of the mesh, running "
            f"statistics that do not, and axis_name={axis_name!r}. Name those axes too, axis_name="
            f"{(*(n for n in names if n), *missing)!r}; for statistics of each device's share "
            "alone, also set virtual_batch_size to the number of its examples. If the axis carries "
            "features, or independent runs, give running statistics that are sharded over it too."
        )


def grouped(all_replicas: NamedAxis, groups: tuple[tuple[int, ...], ...]) -> Groups:
    """The replicas in groups, with the collective that these axes and groups allow."""
    equal = len(set(map(len, groups))) == 1
    kind = Groups if equal and not all_replicas.mapped else AnyGroups
    return kind(all_replicas.name, all_replicas.members, all_replicas.mapped, groups)


def _on_mesh(names: tuple[str, ...]) -> bool:
    """True if all names are axes of a mesh, in a `shard_map` or `pmap`."""
    return set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes)


def _names(axis_name) -> tuple:
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def _bound(operation: str, axis_name: AxisName) -> tuple[str, ...]:
    names = _names(axis_name)
    if not names or any(isinstance(n, int | tuple | list | None) for n in names):
        raise TypeError(
            f"{operation}: axis_name must be the name of an axis, or a tuple of names; got "
            f"axis_name={axis_name!r}. Give the name that vmap, pmap or the mesh has for it."
        )
    if len(set(names)) < len(names):
        raise ValueError(
            f"{operation}: axis_name names an axis twice; got axis_name={axis_name!r}. Name each "
            "axis once."
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
    on_mesh = jax.sharding.get_abstract_mesh().manual_axes
    mapped = [name for name in names if name not in on_mesh]
    if mapped and on_mesh and _varies(tuple(on_mesh)):
        raise ValueError(
            f"{operation}: inside jax.shard_map with check_vma=True JAX has no sum over an axis of "
            f"jax.vmap; got axis_name={axis_name!r}, of which {mapped} is one. Use "
            "check_vma=False, or fold that axis into the batch."
        )
    return names


def _checked(operation: str, all_replicas: NamedAxis, groups) -> tuple[tuple[int, ...], ...]:
    names, size = all_replicas.name, all_replicas.members
    try:
        found = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError:
        raise TypeError(
            f"{operation}: axis_index_groups must be a list of lists of indices; got {groups!r}. "
            f"For example {_halves(size)}."
        ) from None
    if sorted(i for g in found for i in g) != list(range(size)) or not all(found):
        raise ValueError(
            f"{operation}: axis_index_groups must hold each of the {size} indices of "
            f"axis_name={names[0] if len(names) == 1 else names} once; got "
            f"{[list(g) for g in found]}. For example {_halves(size)}."
        )
    return found


def _halves(size: int) -> list[list[int]]:
    half = max(1, size // 2)
    return [list(range(start, min(start + half, size))) for start in range(0, size, half)]
