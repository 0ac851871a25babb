"""Folded models: Linen modules in which calls are hooked, NNX graphs with other modules."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import FrozenDict, freeze
from flax.core import unfreeze as thawed

from jaxnorm.models.adapt import evaluating
from jaxnorm.models.calls import Path, rewritten
from jaxnorm.models.graph import with_modules
from jaxnorm.tools.fold.exact import Exact
from jaxnorm.tools.fold.layout import undone
from jaxnorm.tools.fold.linear import Linear
from jaxnorm.tools.fold.pairs import Folding
from jaxnorm.tools.fold.program import Program, path_names
from jaxnorm.tools.fold.scaling import BATCH_NORMS, Scaling

KERNEL, BIAS, BORDER = "kernel", "bias", "border_kernel"


@dataclass(frozen=True)
class _Removed:
    """A layer that has become the identity.

    Attributes:
        argument: rank of its array among the leaves of its arguments.
        dtype: of its result; None: of its array.
        is_batch_norm: True if it has a mode in which it is not the identity.
    """

    argument: int
    dtype: Any
    is_batch_norm: bool

    @classmethod
    def of(cls, scaling: Scaling, program: Program) -> _Removed:
        given, made = (program.types[v].dtype for v in (scaling.source, scaling.result))
        is_batch_norm = isinstance(scaling.call.module, BATCH_NORMS)
        return cls(scaling.argument, None if given == made else made, is_batch_norm)

    def __call__(self, name: str, average: bool | None, args: Any, kwargs: Any) -> jax.Array:
        if self.is_batch_norm and average is None:
            average = kwargs.get("use_running_average", args[1] if len(args) > 1 else None)
        if self.is_batch_norm and average is False:
            raise ValueError(
                f"fold: a folded model must be called in evaluation; {name}, which is folded into "
                "another layer, was called with use_running_average=False. Train the model that "
                "was folded, and fold it anew."
            )
        x = jax.tree.leaves((args, kwargs))[self.argument]
        return x if self.dtype is None else x.astype(self.dtype)


@dataclass(frozen=True)
class _Changed:
    """A linear layer that something was folded into.

    Attributes:
        plain: the layer of Flax, without bias, that runs in its place; None: itself.
        arguments: args and kwargs of the layer's call, with None for its array.
        border: the layer that is applied to an image of ones with `border_kernel`; None if there is
            no such map.
        has_bias: True if `bias` is added.
        dtype: of the result.
    """

    plain: Any
    arguments: Any
    border: Any
    has_bias: bool
    dtype: Any

    @classmethod
    def of(cls, linear: Linear) -> _Changed:
        added = added_arrays(linear)
        layer, kind = linear.call.module, linear.plain_type or type(None)
        plain = border = None
        if KERNEL in added:
            plain = _layer_of_flax(layer, kind)
        if BORDER in added:
            outputs = linear.equation.traced.outvars[0].aval.shape
            features = outputs[linear.equation.params["dimension_numbers"].out_spec[1]]
            border = _layer_of_flax(
                layer, kind, features=features, feature_group_count=1, precision="highest"
            )
        return cls(plain, linear.call.arguments, border, BIAS in added, linear.dtype)

    def __call__(self, call: Any, variables: Any, args: Any, kwargs: Any) -> jax.Array:
        arrays = [leaf for leaf in jax.tree.leaves((args, kwargs)) if isinstance(leaf, jax.Array)]
        if self.plain is None:
            y = call(*args, **kwargs)
        else:
            leaves, tree = jax.tree.flatten(self.arguments, is_leaf=lambda leaf: leaf is None)
            args, kwargs = tree.unflatten([arrays[0] if leaf is None else leaf for leaf in leaves])
            y = self.plain.apply({"params": {KERNEL: variables[KERNEL]}}, *args, **kwargs)
        y = y.astype(self.dtype)
        if self.border is not None:
            rank = len(self.border.kernel_size)
            ones = jnp.ones((1, *arrays[0].shape[-rank - 1 : -1], 1), self.dtype)
            border = self.border.apply({"params": {KERNEL: variables[BORDER]}}, ones)
            y = y + border.reshape(border.shape[1:]).astype(y.dtype)
        return y + jnp.asarray(variables[BIAS], y.dtype) if self.has_bias else y


def _layer_of_flax(layer: Any, kind: Any, **changes: Any) -> Any:
    """A Linen layer that does what a layer does as an instance of one of Flax's classes."""
    of_linen = {"Linear": "Dense", "LinearGeneral": "DenseGeneral"}
    name = str(of_linen.get(kind.__name__, kind.__name__))
    of_nnx = kind.__module__.startswith("flax.nnx.")
    kind = getattr(linen, name)
    names = {field.name for field in dataclasses.fields(kind)} - {"parent", "name"}
    if of_nnx:
        names -= {"promote_dtype"}  # of another signature in NNX
    fields = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    if "features" in names and "features" not in fields:
        fields["features"] = layer.out_features
    if "batch_dims" in names and hasattr(layer, "batch_axis"):
        fields["batch_dims"] = tuple(layer.batch_axis)
    if "shape" in names and "shape" not in fields:
        fields["shape"] = layer.kernel_shape
    changes |= {"use_bias": False, "mask": None, "bias_shape": None}
    fields |= {name: value for name, value in changes.items() if name in names}
    return kind(**fields, parent=None)


def changed_arrays(folding: Folding, program: Program) -> dict[int, np.ndarray]:
    """The variables that get other values, in float64."""
    arrays = dict(folding.neutral)
    for linear in folding.linear:
        if linear.variable is None:
            continue
        arrays[linear.variable] = undone(linear.kernel_moves, linear.kernel)
        if linear.bias_variable is not None:
            shape = program.shape(linear.bias_variable)
            lead = (1,) * (linear.bias.ndim - len(shape))
            arrays[linear.bias_variable] = np.broadcast_to(linear.bias, lead + shape).reshape(shape)
    return arrays


def added_arrays(linear: Linear) -> dict[str, np.ndarray]:
    """The new variables of a layer, by name, in float64."""
    arrays: dict[str, np.ndarray] = {}
    if linear.variable is None:
        arrays[KERNEL] = undone(linear.kernel_moves, linear.kernel)
    if linear.has_bias and (linear.bias_variable is None or linear.variable is None):
        arrays[BIAS] = linear.stored_bias()
    if linear.taps is not None:
        arrays[BORDER] = undone(linear.kernel_moves, linear.taps)
    return arrays


def removed_variables(
    folding: Folding, program: Program, exact: Exact, paths: list[Path]
) -> set[int]:
    """The variables that nothing reads any more."""
    removed: set[int] = set()
    for linear in folding.linear:
        if linear.variable is None:
            removed |= exact.variables_of(linear.equation.operands[1 - linear.data])
            if linear.bias_variable is not None:
                removed.add(linear.bias_variable)
    # What a removed layer holds and nobody else reads, read in evaluation or not.
    within = [scaling.call for scaling in folding.removed]
    within += [linear.outer for linear in folding.linear if linear.variable is None]
    for variable, path in zip(program.variables, paths):
        for call in within:
            readers = program.readers.get(variable, ())
            if path[: len(call.path)] == call.path and all(map(call.holds, readers)):
                removed.add(variable)
    return removed


@dataclass(frozen=True, eq=False)
class _Running:
    """The hook of a folded Linen model."""

    removed: dict[Path, _Removed]
    changed: dict[Path, _Changed]

    def __call__(self, call, path: Path, module: Any, args, kwargs):
        if path in self.removed:
            average = getattr(module, "use_running_average", None)
            return self.removed[path]("/".join(path), average, args, kwargs)
        if path in self.changed:
            variables = module.variables.get("params", {})
            return self.changed[path](call, variables, args, kwargs)
        return call(*args, **kwargs)


def folded_linen(
    model: linen.Module, variables: Any, folding: Folding, program: Program, exact: Exact
) -> tuple[linen.Module, Any]:
    """The folded form of a Linen module, and its variables."""
    hook = _Running(
        {s.call.path: _Removed.of(s, program) for s in folding.removed},
        {linear.outer.path: _Changed.of(linear) for linear in folding.linear},
    )
    leaves, tree = jax.tree_util.tree_flatten_with_path(variables)
    numbered = [i for i, (_, leaf) in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    arrays = dict(zip(program.variables, (leaves[i][1] for i in numbered)))
    # Without the name of the collection; boxes add keys behind.
    paths = [path_names(leaves[i][0])[1:] for i in numbered]
    changed = changed_arrays(folding, program)
    removed = removed_variables(folding, program, exact, paths)
    marker = object()
    filled: list[Any] = [leaf for _, leaf in leaves]
    for i, variable in zip(numbered, program.variables):
        if variable in removed:
            filled[i] = marker
        elif variable in changed:
            filled[i] = rounded(changed[variable], filled[i])
    mapping = tree.unflatten(filled)
    mapping = _without(thawed(mapping) if isinstance(variables, FrozenDict) else mapping, marker)
    for linear in folding.linear:
        added = added_arrays(linear)
        if not added:
            continue
        place = mapping.setdefault("params", {})
        for key in linear.outer.path:
            place = place.setdefault(key, {})
        like = arrays[_like(linear, exact)]
        place.update({k: rounded(v, like, linear.stored) for k, v in added.items()})
    mapping = {name: tree for name, tree in mapping.items() if tree or not variables[name]}
    result = freeze(mapping) if isinstance(variables, FrozenDict) else mapping
    return rewritten(evaluating(model), hook), result


def _like(linear: Linear, exact: Exact) -> int:
    """A variable whose devices and dtype new variables get."""
    if linear.variable is not None:
        return linear.variable
    return min(exact.variables_of(linear.equation.operands[1 - linear.data]))


def _without(tree: Any, marker: object) -> Any:
    """A nest of dictionaries without the leaves that are a marker, and what is empty then."""
    if not isinstance(tree, dict):
        boxed = jax.tree.leaves(tree)
        return marker if boxed and all(leaf is marker for leaf in boxed) else tree
    kept = {}
    for key, value in tree.items():
        left = _without(value, marker)
        if left is marker or (isinstance(left, dict) and not left and value):
            continue
        kept[key] = left
    return kept


def rounded(array: np.ndarray, like: Any, dtype: Any = None) -> jax.Array:
    """An array in the dtype and on the devices of another one."""
    made = np.asarray(array).astype(like.dtype if dtype is None else dtype)
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return jnp.asarray(made)
    if made.shape != like.shape and isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.device_put(made, sharding)


class FoldedNorm(nnx.Module):
    """A norm that is folded into another layer: the identity.

    Args:
        removed: what it does instead.
    """

    def __init__(self, removed: _Removed) -> None:
        self.removed = removed
        self.use_running_average = True  # `train()` turns it off, and the call then refuses

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return the array that the norm is given."""
        return self.removed("a norm", self.use_running_average, args, kwargs)


class FoldedLinear(nnx.Module):
    """A linear layer with what was folded into it and it has no field for.

    Args:
        layer: the layer.
        changed: what is called.
        arrays: the new variables, by name.
    """

    def __init__(self, layer: nnx.Module, changed: _Changed, arrays: dict[str, Any]) -> None:
        if changed.plain is None:
            self.layer = layer
        self.changed = changed
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Return what the layer returns, and what was folded into it."""
        variables = {
            name: getattr(self, name)[...] for name in (KERNEL, BIAS, BORDER) if hasattr(self, name)
        }
        return self.changed(getattr(self, "layer", None), variables, args, kwargs)


def folded_nnx(model: nnx.Module, folding: Folding, program: Program, exact: Exact) -> nnx.Module:
    """The folded form of an NNX module."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    numbered = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]
    arrays = dict(zip(program.variables, (leaves[i] for i in numbered)))
    changed = changed_arrays(folding, program)
    for i, variable in zip(numbered, program.variables):
        if variable in changed:
            leaves[i] = rounded(changed[variable], leaves[i])
    removed = {s.call.path: _Removed.of(s, program) for s in folding.removed}
    linears = {linear.outer.path: linear for linear in folding.linear}

    def change(path: Path, old: nnx.Module) -> nnx.Module | None:
        if path in removed:
            return FoldedNorm(removed[path])
        if path not in linears:
            return None
        linear = linears[path]
        like = arrays[_like(linear, exact)]
        added = {k: rounded(v, like, linear.stored) for k, v in added_arrays(linear).items()}
        if not added:
            return None
        return _with_bias(linear, old, added) or FoldedLinear(old, _Changed.of(linear), added)

    return evaluating(with_modules(nnx.merge(graph, tree.unflatten(leaves)), change))


def _with_bias(linear: Linear, old: Any, added: dict[str, Any]) -> nnx.Module | None:
    """A layer of Flax with the bias that it had not; None if it cannot hold what was added."""
    features = tuple(np.atleast_1d(getattr(old, "out_features", 0)))
    if set(added) != {BIAS} or linear.is_widened or added[BIAS].shape != features:
        return None
    new = object.__new__(type(old))
    vars(new).update(vars(old))
    new.bias, new.use_bias = nnx.Param(added[BIAS]), True
    return new
