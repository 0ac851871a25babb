"""Layers of a Flax model, in the order in which an example passes through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import linen

from jaxnorm.models.adapt import in_evaluation
from jaxnorm.models.calls import Path, hooked_copy, rewritten
from jaxnorm.models.trace import on_arrays


@dataclass
class Layer:
    """A module within a model.

    Attributes:
        path: names of the modules around it and its own; empty for the model itself.
        module: an NNX module of a copy of the model, or a Linen module without variables.
        inputs: shape and dtype of the first argument of each call.
    """

    path: Path
    module: Any
    inputs: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The path as filters match it, such as "block_0/norm"."""
        return "/".join(self.path) or type(self.module).__name__


@dataclass(frozen=True, eq=False)
class _Noting:
    """The hook that keeps every layer that is called."""

    layers: dict[Path, Layer] = field(hash=False, compare=False)

    def __call__(self, call, path: Path, module: Any, args, kwargs):
        if path not in self.layers:
            kept = module.clone(parent=None) if isinstance(module, linen.Module) else module
            self.layers[path] = Layer(path, kept)
        first = args[0] if args else next(iter(kwargs.values()), None)
        if first is not None and hasattr(first, "dtype") and hasattr(first, "shape"):
            self.layers[path].inputs.append(jax.ShapeDtypeStruct(first.shape, first.dtype))
        return call(*args, **kwargs)


def called_layers(
    operation: str,
    model: Any,
    variables: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> dict[Path, Layer]:
    """The layers that an example passes through in evaluation, in this order.

    A layer comes before the layers within it. Nothing runs on a device.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: a Linen or NNX module.
        variables: collections of a Linen module; None for NNX.
        args: example inputs.
        kwargs: further keyword arguments of the call.

    Raises:
        TypeError, ValueError: the model cannot be called with these.
    """
    layers: dict[Path, Layer] = {}
    hook = _Noting(layers)
    linen_model = isinstance(model, linen.Module)
    hooking = rewritten(model, hook) if linen_model else hooked_copy(model, hook)

    def run(variables, args, kwargs):
        return in_evaluation(operation, hooking, variables, args, kwargs)

    evaluation, arrays = on_arrays(run, (variables, args, dict(kwargs or {})), {})
    jax.eval_shape(evaluation, arrays)
    return layers
