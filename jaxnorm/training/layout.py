"""The layout of a run on a mesh: which axes split the batch, and which axes split the parameters.

A layout never changes the computed numbers. It names the sharding of every leaf of a state and of a
batch, and the compiler's partitioner does the rest. So a model needs no axis name and no collective
of its own: under `jit` the statistics of a sharded batch are those of the whole batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from jaxnorm.training.state import TrainState

AxisNames = str | tuple[str, ...]
Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The placement of a training run on a mesh of devices.

    Give the same layout to `create_train_state`, `make_train_step` and `make_eval_step`. Two
    constructors cover most runs. `Layout.data_parallel()` keeps the whole state on every device.
    `Layout.fully_sharded()` splits parameters and optimizer state too (ZeRO stage 3, Rajbhandari et
    al. 2020, section 5): a parameter is gathered when the forward pass needs it.

    An axis of `parameter_axes` that is not one of `batch_axes` splits the arithmetic as well
    (tensor parallelism). Parameters are not gathered over such an axis, and the compiler chooses
    how the products with them are partitioned.

    `jax.make_mesh` makes Explicit meshes by default since JAX 0.12. A layout turns them into Auto
    meshes. In Explicit mode every operation of a model must say how the shardings of its operands
    combine, and a model that was written for one device does not type-check on a split kernel.

    Attributes:
        mesh: the devices. Its axes are Auto, whatever they were in the mesh that was given.
        batch_axes: names of the axes that split the leading axis of a batch. None means all axes.
        parameter_axes: names of the axes that split parameters and optimizer state. Together they
            split one dimension of each leaf: the largest one that their size divides, and of equal
            ones the last.
        min_size: leaves with fewer elements stay whole, and so do running statistics, counters and
            keys. Gathering a short vector costs more than storing it.

    Raises:
        TypeError: `mesh` is not a `jax.sharding.Mesh`.
        ValueError: the mesh lacks an axis that is named, or an axis is named twice.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np, optax
        >>> from jaxnorm.training import Layout, create_train_state, make_train_step
        >>> layout = Layout.fully_sharded(jax.make_mesh((1,), ("data",)))
        >>> model, optimizer = nn.Dense(64), optax.adam(1e-3)
        >>> state = create_train_state(model, optimizer, 0, jnp.ones((1, 32)), layout=layout)
        >>> state.params["kernel"].sharding == layout.parameter((32, 64))
        True
        >>> step = make_train_step(model, optimizer, lambda y, b: (y**2).mean(), layout=layout)
        >>> state, metrics = step(state, layout.batch(np.ones((8, 32), np.float32)))
        >>> state.params["kernel"].sharding == layout.parameter((32, 64))
        True
    """

    mesh: Mesh
    batch_axes: AxisNames | None = None
    parameter_axes: AxisNames = ()
    min_size: int = 1024

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"Layout: mesh must be a jax.sharding.Mesh; got {type(self.mesh).__name__}. Make "
                'one: jax.make_mesh((jax.device_count(),), ("data",)).'
            )
        names = self.mesh.axis_names
        axis_types = (AxisType.Auto,) * len(names)
        batch_axes = names if self.batch_axes is None else self.batch_axes
        for field, value in {
            "mesh": Mesh(self.mesh.devices, names, axis_types=axis_types),
            "batch_axes": self._named("batch_axes", batch_axes),
            "parameter_axes": self._named("parameter_axes", self.parameter_axes),
        }.items():
            object.__setattr__(self, field, value)

    @classmethod
    def data_parallel(cls, mesh: Mesh | None = None) -> Layout:
        """A layout that splits the batch over all axes and keeps the whole state on every device.

        Args:
            mesh: the devices. The default is all devices of all processes, on one axis "data".
        """
        return cls(_all_devices() if mesh is None else mesh)

    @classmethod
    def fully_sharded(cls, mesh: Mesh | None = None) -> Layout:
        """A layout that splits batch, parameters and optimizer state over all axes.

        Args:
            mesh: the devices. The default is all devices of all processes, on one axis "data".
        """
        mesh = _all_devices() if mesh is None else mesh
        return cls(mesh, parameter_axes=tuple(mesh.axis_names))

    def shardings(self, state: TrainState) -> Any:
        """The sharding of each leaf of a state: a TrainState of `jax.sharding.NamedSharding`.

        Args:
            state: a state of arrays, or of the `jax.ShapeDtypeStruct`s of `jax.eval_shape`; only
                shapes matter.

        Raises:
            TypeError: `state` is not the TrainState of one run.
        """
        is_state = isinstance(state, TrainState)
        if not is_state or state.step.ndim:
            given = "a sweep" if is_state else type(state).__name__
            raise TypeError(
                f"Layout: only the TrainState of one run has a layout; got {given}. Make one with "
                "create_train_state, or jax.eval_shape of it."
            )
        whole = jax.tree.map(lambda _: self._sharding(), state)
        parts = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda x: self.parameter(x.shape), parts)
        return whole.replace(params=params, opt_state=opt_state)

    def place(self, state: TrainState) -> TrainState:
        """Move a state to its shardings; a `jax.ShapeDtypeStruct` gets the sharding instead.

        Args:
            state: a TrainState, on any devices. It must be the same on every process.

        Raises:
            TypeError: `state` is not the TrainState of one run.
        """
        return jax.tree.map(put, state, self.shardings(state))

    def batch(self, batch: Any, *, scan: bool = False) -> Any:
        """A batch as global arrays, its leading axis split over `batch_axes`.

        An array that lies on the mesh in this way already is returned as it is. Arrays of shape ()
        go to all devices.

        Args:
            batch: a pytree of NumPy's or JAX's arrays. They are this process's share of the rows,
                in the order of its devices in the mesh; with one process that is the whole batch.
                Arrays over all devices of the mesh are accepted too, and so are
                `jax.ShapeDtypeStruct`s of the global shape.
            scan: True if the leading axis counts steps, as in `make_train_step(..., scan=True)`.
                Then the second axis is split.

        Returns:
            The same tree of global `jax.Array`s.

        Raises:
            ValueError: the rows cannot be split evenly over the devices.
        """
        return place_batch("Layout.batch", self, batch, scan)

    def rows(self, ndim: int, *, scan: bool = False) -> NamedSharding:
        """The sharding of one leaf of a batch, an array of rank `ndim`; see `batch`."""
        leading = (None,) * scan
        axes = tuple(self.batch_axes or ())
        return self._sharding(*leading, axes) if ndim > scan else self._sharding()

    def parameter(self, shape: tuple[int, ...], *, gathered: bool = False) -> NamedSharding:
        """The sharding of a parameter, or with `gathered` its sharding in the forward pass."""
        of_batch = tuple(self.batch_axes or ())
        # The axes of the batch come last, so that the result of a gather over them is contiguous.
        # Axes of size 1 are left out: the compiler drops them, and a step must return the shardings
        # that it was given.
        axes = [name for name in self.parameter_axes if self.mesh.shape[name] > 1]
        axes.sort(key=lambda name: name in of_batch)
        parts = math.prod(self.mesh.shape[name] for name in axes)
        fitting = [d for d, size in enumerate(shape) if size and size % parts == 0]
        if not axes or math.prod(shape) < self.min_size or not fitting:
            return self._sharding()
        dimension = max(fitting, key=lambda d: (shape[d], d))
        if gathered:
            axes = [name for name in axes if name not in of_batch]
        return self._sharding(*(None,) * dimension, tuple(axes) or None)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """A context that traces for this mesh, whatever mesh the caller has set."""
        return use_abstract_mesh(self.mesh.abstract_mesh)

    def _sharding(self, *axes: tuple[str, ...] | None) -> NamedSharding:
        # JAX takes a name and a tuple of one name for different shardings: use the name.
        flat = (a[0] if a and len(a) == 1 else a or None for a in axes)
        return NamedSharding(self.mesh, PartitionSpec(*flat))

    def _named(self, field: str, value: Any) -> tuple[str, ...]:
        names = (value,) if isinstance(value, str) else tuple(value)
        known = self.mesh.axis_names
        if set(names) <= set(known) and len(set(names)) == len(names):
            return names
        raise ValueError(
            f"Layout: {field} must name axes of the mesh, each once; got {field}={value!r} for a "
            f"mesh with the axes {', '.join(map(repr, known))}. Choose among these."
        )


def place_batch(operation: str, layout: Layout, batch: Any, scan: bool = False) -> Any:
    """Place a batch as `Layout.batch` does, with errors that name the calling operation."""

    def place(leaf: Any) -> Any:
        leaf = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
        sharding = layout.rows(leaf.ndim, scan=scan)
        if isinstance(leaf, jax.Array) and _lies(leaf, sharding):
            return leaf
        # With several processes, an array that one process holds whole is its share of the rows.
        share = not sharding.is_fully_addressable and not (
            isinstance(leaf, jax.ShapeDtypeStruct)
            or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable)
        )
        if leaf.ndim > scan:
            _check_rows(operation, layout, leaf.shape, int(scan), share=share)
        if share:
            return jax.make_array_from_process_local_data(sharding, leaf)  # type: ignore[arg-type]
        return put(leaf, sharding)

    return jax.tree.map(place, batch)


def check_layout(operation: str, layout: Any) -> Layout | None:
    """Raise a three-part TypeError for anything but a layout or None."""
    if layout is None or isinstance(layout, Layout):
        return layout
    raise TypeError(
        f"{operation}: layout must be a jaxnorm.training.Layout; got {type(layout).__name__}. Make "
        "one: Layout.data_parallel(mesh), or Layout.fully_sharded(mesh)."
    )


def check_placed(operation: str, layout: Layout, state: TrainState) -> None:
    """Raise a three-part ValueError for a state that does not lie as `layout` says."""
    leaves, treedef = jax.tree.flatten(state)
    wanted = _shardings(layout, treedef, tuple(leaf.shape for leaf in leaves))
    for i, (leaf, sharding) in enumerate(zip(leaves, wanted)):
        if _lies(leaf, sharding):
            continue
        path = jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(state)[i][0])
        raise ValueError(
            f"{operation}: the state must lie where the layout puts it; state{path} of shape "
            f"{leaf.shape} is on {leaf.sharding} instead of {sharding}. Give create_train_state "
            "the same layout, or move the state: layout.place(state)."
        )


@functools.lru_cache(maxsize=64)  # called before each step
def _shardings(layout: Layout, treedef: Any, shapes: tuple[tuple[int, ...], ...]) -> list[Any]:
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.tree.leaves(layout.shardings(jax.tree.unflatten(treedef, structs)))


# The functions `keep_...` are for use inside a compiled step. Without a layout each of them returns
# its argument.


def keep_batch(operation: str, layout: Layout | None, batch: Tree, groups: int = 1) -> Tree:
    """The batch, constrained to stay split, as is each of `groups` equal parts of it."""
    if layout is None:
        return batch

    def keep(leaf: Any) -> Any:
        if not jnp.ndim(leaf):
            return leaf
        _check_rows(operation, layout, jnp.shape(leaf), 0, groups)
        return lax.with_sharding_constraint(leaf, layout.rows(jnp.ndim(leaf)))

    return jax.tree.map(keep, batch)


def keep_state(layout: Layout | None, state: TrainState) -> TrainState:
    """The new state, constrained to the shardings of the old one."""
    if layout is None:
        return state
    return lax.with_sharding_constraint(state, layout.shardings(state))


def keep_parameters(layout: Layout | None, params: Tree, *, gathered: bool = False) -> Tree:
    """Parameters or their gradients, constrained to stay split, or with `gathered` to be gathered.

    `gathered` gives the sharding that the forward pass needs. Without this constraint the compiler
    sometimes gathers the activations and leaves the kernel split. It does so if a kernel is larger
    than the activations that it is multiplied with.
    """
    if layout is None or not layout.parameter_axes:
        return params
    shardings = jax.tree.map(lambda p: layout.parameter(p.shape, gathered=gathered), params)
    return lax.with_sharding_constraint(params, shardings)


def _all_devices() -> Mesh:
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def _lies(leaf: Any, sharding: NamedSharding) -> bool:
    given = leaf.sharding
    return given == sharding or (
        isinstance(given, NamedSharding)
        and given.mesh == sharding.mesh  # an Explicit mesh would enter the arrays' types
        and given.is_equivalent_to(sharding, leaf.ndim)
    )


def put(leaf: Any, sharding: NamedSharding) -> Any:
    """An array moved to `sharding`, or a `jax.ShapeDtypeStruct` that carries it.

    With several processes, each process holds the whole array and keeps the part of its own
    devices.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if elsewhere or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _check_rows(
    operation: str,
    layout: Layout,
    shape: tuple[int, ...],
    axis: int,
    groups: int = 1,
    *,
    share: bool = False,
) -> None:
    mesh, names = layout.mesh, tuple(layout.batch_axes or ())
    parts = math.prod(mesh.shape[name] for name in names)
    where = f"the {parts} parts of the mesh axes {', '.join(map(repr, names))}"
    if share:  # as many parts as this process's devices have different rows
        rows = layout.rows(1).addressable_devices_indices_map((parts,)).values()
        parts = len({index[0].start for index in rows})  # type: ignore[index]
        where = f"the {parts} parts of this process"
    if shape[axis] % (parts * groups) == 0:
        return
    micro = f" in each of the {groups} micro-batches" if groups > 1 else ""
    raise ValueError(
        f"{operation}: the rows of a batch must be split evenly over {where}{micro}; got a leaf of "
        f"shape {shape} with {shape[axis]} rows. Make them a multiple of {parts * groups}: drop or "
        "pad the last batch, or mask the rows that are added."
    )
