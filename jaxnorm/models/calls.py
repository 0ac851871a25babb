"""Calls of the layers of a Flax model that is left as it is.

A hook is called in place of every layer of a model, with the call itself, and returns what the call
is to return. Linen has interceptors for that. An NNX module is copied, and the layers of the copy
get classes derived from their own, since classes are what NNX carries into `scan`, `vmap` and
`remat`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen, nnx

from jaxnorm.models.graph import copied

Path = tuple[str, ...]
"""The names of the modules around a layer, and its own. The path of the model itself is empty."""

Hook = Callable[[Callable[..., Any], Path, Any, tuple[Any, ...], dict[str, Any]], Any]
"""A function ``(call, path, module, args, kwargs)``; `call(*args, **kwargs)` calls the layer."""

# JAX may have traced a compiled part of the model before, with other hooks: within this context
# it traces that part again.
_hooking = jax.make_user_context(default_value=None)


class _Present(threading.local):
    """The layers that are being called, innermost last."""

    def __init__(self) -> None:
        self.path: Path = ()  # of the NNX layer
        self.rewritten: tuple[type, ...] = ()  # the Linen classes that `rewritten` made


_present = _Present()


@contextlib.contextmanager
def hooked(hook: Hook, within: Path = ()) -> Iterator[None]:
    """Hook the calls of all Linen modules that are traced within it.

    Args:
        hook: called in place of every module's `__call__`.
        within: path of the model in the modules around it; what lies outside is not hooked.
    """

    def intercept(call, args, kwargs, context):
        module, method = context.module, context.method_name
        path = module.path
        if method != "__call__" or path[: len(within)] != within:
            return call(*args, **kwargs)
        return hook(call, path[len(within) :], module, args, kwargs)

    with _hooking((_hooking.value, hook)), linen.intercept_methods(intercept):
        yield


def rewritten(model: linen.Module, hook: Hook) -> linen.Module:
    """A Linen module that is used as `model` is, and in which the calls of layers are hooked.

    Args:
        model: any module that is not bound to variables. It is not changed.
        hook: called in place of every module's `__call__`, that of the model itself included.

    Returns:
        A module of a class derived from the model's, with the same name, fields and methods.
    """
    kind = type(model)
    methods = {
        name: method
        for name in dir(kind)
        if inspect.isfunction(method := inspect.getattr_static(kind, name))
        and (name == "__call__" or not name.startswith("__"))
        and inspect.getattr_static(linen.Module, name, None) is not method
        and name != "setup"
    }
    scope: dict[str, Any] = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    derived = type(kind.__name__, (kind,), scope)

    def entered(method):
        @functools.wraps(method)
        def run(self, *args, **kwargs):
            if derived in _present.rewritten:  # one method calls another
                return method(self, *args, **kwargs)
            outer = _present.rewritten
            _present.rewritten = (*outer, derived)
            try:
                with hooked(hook, self.path if self.scope is not None else ()):
                    return method(self, *args, **kwargs)
            finally:
                _present.rewritten = outer

        return run

    for name, method in methods.items():
        setattr(derived, name, entered(method))
    fields = {f: getattr(model, f) for f in model.__dataclass_fields__ if f != "parent"}
    return derived(**fields, parent=None)


def hooked_copy(model: nnx.Module, hook: Hook) -> nnx.Module:
    """A copy of an NNX module, in which the calls of layers are hooked.

    Args:
        model: any module. It is not changed; the copy holds new variables of the same arrays.
        hook: called in place of every module's `__call__`. Two hooks that are equal give one
            class, which calls the first of them, so that nothing is compiled again. A hook that
            notes what it sees must therefore be equal to itself alone.
    """
    copy = copied(model)
    for path, module in nnx.iter_modules(copy):
        if "__call__" in dir(type(module)):
            # Not through NNX, which would take it for an attribute.
            object.__setattr__(
                module, "__class__", _subclass(type(module), tuple(map(str, path)), hook)
            )
    return copy


@functools.lru_cache(maxsize=4096)
def _subclass(kind: type, path: Path, hook: Hook) -> type:
    original = kind.__call__

    @functools.wraps(original)
    def call(self, *args, **kwargs):
        outer = _present.path
        _present.path = path
        # Each name once: the scopes of the modules around this one are there already.
        inner = path[len(outer) :] if path[: len(outer)] == outer else path
        with contextlib.ExitStack() as scopes:
            scopes.callback(setattr, _present, "path", outer)
            scopes.enter_context(jax.named_scope("/".join(inner or path) or kind.__name__))
            return hook(functools.partial(original, self), path, self, args, kwargs)

    # The name stays: errors show it, and layers are selected by it.
    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
