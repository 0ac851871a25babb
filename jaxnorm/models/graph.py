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
    replaced: list[Path] = []
    for path, module in sorted(modules, key=lambda entry: len(entry[0])):
        if any(path[: len(outer)] == outer for outer in replaced):
            continue
        # An object apart, so that the new module may hold the old one.
        old = object.__new__(type(module))
        vars(old).update(vars(module))
        new = change(path, old)
        if new is not None and new is not old:
            _become(module, new)
            replaced.append(path)
    return copy


def _become(module: Any, new: Any) -> None:
    """Turn a module into another, so that all that refers to it refers to the other."""
    attributes = dict(vars(new))
    vars(module).clear()
    # Not through NNX, which would take it for an attribute.
    object.__setattr__(module, "__class__", type(new))
    vars(module).update(attributes)
