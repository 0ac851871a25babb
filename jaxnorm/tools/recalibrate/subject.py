"""Linen and NNX models as the passes over data need them: norms, their statistics, a pure pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from flax.core import FrozenDict, freeze, unfreeze

from jaxnorm.models.calls import Path, hooked, hooked_copy
from jaxnorm.models.graph import copied
from jaxnorm.models.written import after_evaluation
from jaxnorm.tools.recalibrate.collect import FIELDS, Collecting, FromOrigin, collected, empty

Statistics = Mapping[Path, tuple[Any, Any]]
"""Running mean and variance of norms, by their paths."""


class Subject(Protocol):
    """A model whose norms are measured."""

    state: Any
    """All its variables, a tree of arrays."""

    def statistics(self) -> dict[Path, tuple[Any, Any]]:
        """Running mean and variance of everything that has both."""
        ...

    def run(
        self, hook: Collecting, state: Any, statistics: Statistics, args: Any, kwargs: Any
    ) -> dict[Path, FromOrigin]:
        """The moments that one batch gives; can be traced."""
        ...

    def result(self, statistics: Statistics) -> tuple[Any, Any]:
        """The model and its variables with other statistics."""
        ...


@dataclass
class LinenSubject:
    """A Linen module and its collections."""

    operation: str
    model: linen.Module
    variables: Any

    def __post_init__(self) -> None:
        if not isinstance(self.variables, Mapping):
            raise TypeError(
                f"{self.operation}: the variables of a Linen module must be its collections; got "
                f'{type(self.variables).__name__}. Pass {{"params": ..., "batch_stats": ...}}, as '
                "model.init returns them."
            )
        self.state = unfreeze(FrozenDict(self.variables))

    def statistics(self) -> dict[Path, tuple[Any, Any]]:
        """Mean and variance of each scope that has both."""
        found: dict[Path, tuple[Any, Any]] = {}

        def search(path: Path, tree: Any) -> None:
            if not isinstance(tree, Mapping):
                return
            if {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], Mapping):
                found[path] = _unboxed(tree["mean"]), _unboxed(tree["var"])
            for name, inner in tree.items():
                search((*path, name), inner)

        search((), self.state.get("batch_stats", {}))
        return found

    def run(
        self, hook: Collecting, state: Any, statistics: Statistics, args: Any, kwargs: Any
    ) -> dict[Path, FromOrigin]:
        """The moments that one batch gives, from the collection that its call writes."""
        collections = {**state, "batch_stats": _with(state.get("batch_stats", {}), statistics)}
        for path in hook.norms or ():
            place = _at(collections["batch_stats"], path)
            place.update(empty(_unboxed(place["mean"])))
        with hooked(hook):
            written = after_evaluation(self.operation, self.model, collections, args, kwargs)
        places = {path: _at(written, path) for path in hook.norms or ()}
        return {path: collected(at) for path, at in places.items()}

    def result(self, statistics: Statistics) -> tuple[Any, Any]:
        """The module itself, and its collections with other statistics."""
        changed = {**self.state, "batch_stats": _with(self.state["batch_stats"], statistics)}
        return self.model, freeze(changed) if isinstance(self.variables, FrozenDict) else changed


@dataclass
class NNXSubject:
    """An NNX module, which holds its variables."""

    operation: str
    model: nnx.Module

    def __post_init__(self) -> None:
        self._graph, self.state = nnx.split(self.model)

    def statistics(self) -> dict[Path, tuple[Any, Any]]:
        """Mean and variance of each batch norm in the graph."""
        norms = _norms(self.model)
        return {path: (norm.mean.get_value(), norm.var.get_value()) for path, norm in norms.items()}

    def run(
        self, hook: Collecting, state: Any, statistics: Statistics, args: Any, kwargs: Any
    ) -> dict[Path, FromOrigin]:
        """The moments that one batch gives, from the variables of a copy."""
        model = nnx.merge(self._graph, jax.tree.map(lambda x: x, state))
        _put(model, statistics)
        for path, norm in _norms(model).items():
            if path in (hook.norms or ()):
                for name, value in empty(norm.mean.get_value()).items():
                    setattr(norm, name, type(norm.mean)(value))
        model = hooked_copy(model, hook)
        for path, norm in _norms(model).items():
            object.__setattr__(norm, "__class__", _inner_hooked(type(norm), path, hook))
        model = after_evaluation(self.operation, model, None, args, kwargs)
        norms = {path: norm for path, norm in _norms(model).items() if path in (hook.norms or ())}
        return {
            path: collected({name: getattr(norm, name).get_value() for name in FIELDS})
            for path, norm in norms.items()
        }

    def result(self, statistics: Statistics) -> tuple[Any, Any]:
        """A copy of the module with other statistics."""
        model = copied(self.model)
        _put(model, statistics)
        return model, None


def as_subject(operation: str, model: Any, given: tuple[Any, ...]) -> tuple[Subject, Any]:
    """A model as the passes need it, and the batches, from the arguments of a public function.

    Raises:
        TypeError: the model is neither Linen's nor NNX's, or arguments are missing.
    """
    if isinstance(model, linen.Module):
        if len(given) == 2:
            return LinenSubject(operation, model, given[0]), given[1]
        wanted = f"{operation}(model, variables, batches)"
    elif isinstance(model, nnx.Module):
        if len(given) == 1:
            return NNXSubject(operation, model), given[0]
        wanted = f"{operation}(model, batches)"
    else:
        raise TypeError(
            f"{operation}: model must be a flax.linen.Module or a flax.nnx.Module; got "
            f"{type(model).__name__}. Pass an instance, such as Net(features=8)."
        )
    raise TypeError(
        f"{operation}: a Linen module comes with its variables, an NNX module without; got "
        f"{type(model).__name__} and {len(given)} further arguments. Call {wanted}."
    )


def _norms(model: nnx.Module) -> dict[Path, nnx.BatchNorm]:
    return {
        tuple(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }


def _put(model: nnx.Module, statistics: Statistics) -> None:
    for path, norm in _norms(model).items():
        if path in statistics:
            for variable, value in zip((norm.mean, norm.var), statistics[path]):
                variable.set_value(value)


@functools.lru_cache(maxsize=4096)
def _inner_hooked(kind: type, path: Path, hook: Collecting) -> type:
    """A class whose parent's `__call__` is hooked too, for classes that change what they pass on.

    `kind` is hooked already. Its last class that is not Flax's or jaxnorm's gets a hooked one as
    its parent.
    """
    own = kind.__mro__[1]  # what `hooked_copy` derived from
    base = next(c for c in own.__mro__ if c.__module__.split(".")[0] in ("flax", "jaxnorm"))
    if base is own:
        return kind
    original = base.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        return hook(functools.partial(original, self), path, self, args, kwargs)

    between = type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})
    return type(kind.__name__, (kind, between), {"__module__": kind.__module__})


def _unboxed(value: Any) -> Any:
    return value.unbox() if isinstance(value, linen.meta.AxisMetadata) else value


def _at(tree: Any, path: Path) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _with(tree: Any, statistics: Statistics) -> dict[str, Any]:
    """A copy of the collection with other statistics, in the boxes of the old ones."""
    new = unfreeze(FrozenDict(tree))
    for path, values in statistics.items():
        place = _at(new, path)
        for name, value in zip(("mean", "var"), values):
            old = place[name]
            boxed = isinstance(old, linen.meta.AxisMetadata)
            place[name] = old.replace_boxed(value) if boxed else value
    return new


def stored(value: np.ndarray, old: Any) -> Any:
    """A statistic in the dtype of the old one, and where that lies."""
    if not isinstance(old, jax.Array):
        return value.astype(old.dtype)
    # Rounded once. JAX would first round to float32.
    rounded = value.astype(old.dtype)
    if old.is_fully_addressable:
        return (
            jax.device_put(jnp.asarray(rounded), old.sharding)
            if old.committed
            else (jnp.asarray(rounded))
        )
    return jax.make_array_from_callback(old.shape, old.sharding, lambda index: rounded[index])
