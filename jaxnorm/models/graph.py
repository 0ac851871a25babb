"""Copies of NNX modules in which some of the modules are others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from flax import nnx

if TYPE_CHECKING:
    from jaxnorm.models.calls import Path

Module = TypeVar("Module", bound=nnx.Module)


def copied(model: Module) -> Module:
    """A copy of an NNX module, with new variables of the same arrays."""
    # Not `merge` of what was split: it takes the Variables of the state themselves, which are the
    # model's. Nor of a mapped state, whose Variables have other metadata.
    return nnx.clone(model)


def with_modules(model: Module, change: Callable[[Path, nnx.Module], nnx.Module | None]) -> Module:
    """A copy of an NNX module, in which modules are replaced wherever something refers to them.

    Args:
        model: any module. It is not changed.
        change: a function of a path and of the module there in the copy. It returns the module
            to be in its place, or None to leave it. A module that is used at several places has
            the path of the first. A module that is replaced is not searched for others.

    Returns:
        The copy.
    """
    copy = copied(model)
    modules = [(tuple(map(str, path)), module) for path, module in nnx.iter_modules(copy)]
    others: dict[int, nnx.Module] = {}  # by the object that each one replaces
    replaced: list[Path] = []
    for path, module in sorted(modules, key=lambda entry: len(entry[0])):
        if any(path[: len(outer)] == outer for outer in replaced):
            continue
        new = change(path, module)
        if new is not None and new is not module:
            others[id(module)] = new
            replaced.append(path)
    if id(copy) in others:
        return others[id(copy)]  # type: ignore[return-value]
    for _, node in list(nnx.iter_graph(copy)):
        if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.Variable):
            attributes = vars(node)
            # Not through NNX, which would ask again what is data.
            attributes.update({k: _with_others(v, others) for k, v in attributes.items()})
    return copy


def _with_others(value: Any, others: dict[int, nnx.Module]) -> Any:
    """A value of an attribute, with other modules in it and in the containers within it."""
    if id(value) in others:
        return others[id(value)]
    if isinstance(value, list):
        value[:] = [_with_others(each, others) for each in value]
    elif isinstance(value, dict):
        value.update({key: _with_others(each, others) for key, each in value.items()})
    elif isinstance(value, tuple):
        each = [_with_others(each, others) for each in value]
        if any(a is not b for a, b in zip(each, value)):
            return type(value)(*each) if hasattr(value, "_fields") else type(value)(each)
    return value
