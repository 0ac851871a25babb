"""Copies of NNX modules in which some parameters are replaced."""

from collections.abc import Mapping
from typing import TypeVar

from flax import nnx
from flax.typing import Key
from jax import Array

Module = TypeVar("Module")


def with_arrays(module: Module, arrays: Mapping[tuple[Key, ...], Array]) -> Module:
    """Copy of `module` with other arrays in the parameters at these paths.

    All other variables are those of `module`, so what the copy updates is updated there. A copy
    made where it is used may be changed inside of any transformation, and nothing of it is kept.
    """
    graph, state = nnx.split(module)
    variables = dict(nnx.to_flat_state(state))
    variables.update((path, nnx.Param(array)) for path, array in arrays.items())
    return nnx.merge(graph, nnx.from_flat_state(variables))
