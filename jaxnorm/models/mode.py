"""Arguments that tell a model whether it trains, and the form in which its call takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Names of arguments that tell a model its mode, each with its value in training.
MODE_FLAGS: Mapping[str, bool] = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def bound_arguments(
    operation: str, name: str, signature: inspect.Signature, args: Any, kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the form that the call takes, positional if they can be.

    A model under `nn.remat(..., static_argnums=...)` must get its flag by position.
    """
    try:
        bound = signature.bind(None, *args, **kwargs)
    except TypeError as error:
        shapes = ", ".join(
            [str(jax.tree.map(jnp.shape, a)) for a in args]
            + [f"{k}={v!r}" for k, v in kwargs.items() if _is_plain(v)]
        )
        raise TypeError(
            f"{operation}: the model must accept its inputs; {name}.__call__{signature} was given "
            f"({shapes}): {error}. Choose the inputs with inputs=lambda batch: (...), and further "
            "arguments with train_kwargs= or eval_kwargs=."
        ) from error
    return bound.args[1:], bound.kwargs


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def call_signature(model_class: type) -> inspect.Signature:
    """Signature of the call of a class of modules; any arguments where it cannot be read."""
    try:
        return inspect.signature(model_class.__call__)
    except (AttributeError, TypeError, ValueError):
        return inspect.signature(lambda self, *args, **kwargs: None)


def mode_flags(names: Any, train: bool) -> dict[str, bool]:
    """Values of those names that are mode flags."""
    return {name: value == train for name, value in MODE_FLAGS.items() if name in names}


def check_known(
    operation: str, name: str, signature: inspect.Signature, kwargs: Mapping[str, Any] | None
) -> None:
    """Refuse keyword arguments that the call of a model does not take."""
    parameters = signature.parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    unknown = sorted(set(kwargs or {}) - set(signature.parameters))
    if unknown:
        raise TypeError(
            f"{operation}: every keyword argument for the model must be one that its call takes; "
            f"got {', '.join(unknown)} for {name}.__call__{signature}. Pass a name from that "
            "signature."
        )
