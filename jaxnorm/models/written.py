"""Calls of a model in evaluation mode, of which what hooks write is wanted, and not the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.core import DenyList

from jaxnorm.models.graph import copied
from jaxnorm.models.mode import MODE_FLAGS, bound_arguments, call_signature, mode_flags


def after_evaluation(
    operation: str, model: Any, variables: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """The statistics of a model after a call in evaluation mode; can be traced.

    For hooks that write there. What the call writes elsewhere is dropped.

    Args:
        operation: the public function that is being called; errors begin with it.
        model: a Linen or NNX module. It is not changed.
        variables: collections of the Linen module; unused by NNX.
        args: inputs.
        kwargs: further keyword arguments of the call; they win over the mode flags.

    Returns:
        Linen: the collection "batch_stats" after the call. NNX: a copy of the module after it.
    """
    signature = call_signature(type(model))
    flags = set(signature.parameters) & set(MODE_FLAGS)
    merged = {**mode_flags(flags, False), **kwargs}
    args, merged = bound_arguments(operation, type(model).__name__, signature, args, merged)
    if isinstance(model, nnx.Module):
        copy = copied(model)
        copy.eval()
        copy = nnx.view(
            copy, raise_if_not_found=False, deterministic=True, use_running_average=True
        )
        copy(*args, **merged)
        return copy
    if not flags:
        fields = {field.name for field in dataclasses.fields(model)}
        told: dict[str, Any] = dict(mode_flags(fields, False))
        model = model.clone(**told) if told else model
    # A model that draws numbers in evaluation gets some: a stream that is not named draws from
    # "params".
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    _, written = model.apply(
        variables, *args, **merged, rngs=rngs, mutable=DenyList(("params", "intermediates"))
    )
    return written.get("batch_stats", {})
