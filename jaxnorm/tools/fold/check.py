"""Comparison of a folded model with the one that it came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnorm.models.adapt import in_evaluation
from jaxnorm.models.trace import on_arrays
from jaxnorm.testing.tolerances import tolerance

# How many times the effect of one rounding of every number the two models may differ. They round
# in other places, so the effects of several roundings add up.
ROUNDINGS = 8.0


class Comparison(NamedTuple):
    """Largest difference of two models' outputs, relative to the largest output."""

    difference: float
    allowed: float


def compare(
    evaluate: Callable[..., Any], folded: Callable[[], Any], arrays: list[Any], dtype: Any
) -> Comparison:
    """Compare outputs, and measure what rounding does to them.

    The budget of `jaxnorm.testing` is for one computation. How a network of many magnifies the
    rounding of the first ones is measured: all arrays are changed by one rounding error of the
    narrowest dtype, up or down at random.

    Args:
        evaluate: the first model's outputs, as a function of its arrays.
        folded: the folded model's outputs.
        arrays: variables and example.
        dtype: the narrowest floating dtype that the model computes in.
    """
    evaluate = jax.jit(evaluate)
    wanted, got = _wide(evaluate(arrays)), _wide(folded())
    moved = _wide(evaluate(_rounded_otherwise(arrays, dtype)))
    magnified = ROUNDINGS * _difference(moved, wanted)
    return Comparison(_difference(got, wanted), tolerance(dtype, floor=1.0) + magnified)


def _rounded_otherwise(arrays: list[Any], dtype: Any) -> list[Any]:
    random = np.random.default_rng(0)
    eps = float(jnp.finfo(dtype).eps)

    def change(array: Any) -> Any:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        factor = 1 + eps * random.choice([-1.0, 1.0], array.shape)
        return (jnp.asarray(array) * factor).astype(array.dtype)

    return [change(array) for array in arrays]


def _wide(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(outputs)]


def _difference(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """The largest difference of each output, relative to its largest element."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        if not np.all(np.isfinite(b)):
            return np.inf
        difference = np.max(np.abs(a - b), initial=0.0)
        if difference != 0:
            worst = max(worst, float(difference / (np.max(np.abs(b)) or 1.0)))
    return np.inf if np.isnan(worst) else worst


def evaluation(
    operation: str, model: Any, variables: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], list[Any]]:
    """The outputs of a model in evaluation as a function of its arrays, and the arrays."""

    def run(variables, args, kwargs):
        return in_evaluation(operation, model, variables, args, kwargs)

    return on_arrays(run, (variables, args, kwargs), {})
