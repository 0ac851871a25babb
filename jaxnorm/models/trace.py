"""Functions of trees in which only some leaves are arrays, in a form that JAX traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def on_arrays(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Callable, list[Any]]:
    """A function of the arrays among some arguments, and these arrays; all else is constant."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    positions = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def run(arrays: list[Any]) -> Any:
        filled = list(leaves)
        for i, array in zip(positions, arrays):
            filled[i] = array
        args, kwargs = tree.unflatten(filled)
        return function(*args, **kwargs)

    return run, [leaves[i] for i in positions]
