"""Checks of arguments, each with an error in three parts: operation, what it was given, what to do.

All run at trace time: they look at shapes, dtypes and Python values, never at numbers.
"""

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxnorm.core.epilogue import Activation
from jaxnorm.core.moments import promoted

Axes = int | Sequence[int]
Save = Literal["input", "output"]


def inexact(operation: str, name: str, value) -> Array:
    """`value` as an array of floating or complex numbers."""
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(
            f"{operation}: {name} must be a JAX or NumPy array; got {type(value).__name__} "
            f"{_short(value)}. Convert it first: jnp.asarray({name}, jnp.float32)."
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{operation}: {name} must be an array with values; got {value}. To learn the result's "
            "shape without values, use jax.eval_shape."
        )
    if not jnp.issubdtype(value.dtype, jnp.inexact) or jnp.finfo(value.dtype).bits < 16:
        raise TypeError(
            f"{operation}: {name} must hold floating or complex numbers; got "
            f"{name}.dtype={value.dtype}, {name}.shape={value.shape}. Convert it first: "
            f"{name}.astype(jnp.float32)."
        )
    return jnp.asarray(value)


def axes(operation: str, name: str, value: Axes, x) -> tuple[int, ...]:
    """Axes of `x` as sorted non-negative numbers without repetition."""
    try:
        given = tuple(map(operator.index, value if isinstance(value, Iterable) else (value,)))
    except TypeError:
        raise TypeError(
            f"{operation}: {name} must be an int or a tuple of ints; got {name}={value!r}. "
            f"For example {name}=-1."
        ) from None
    if not given:
        raise ValueError(f"{operation}: {name} names no axis; got {name}={value!r}. Name one.")
    if x.ndim == 0:
        raise ValueError(
            f"{operation}: x must have an axis that {name} can name; got x.shape=() with "
            f"{name}={value!r}. Give it one: x[None]."
        )
    for a in given:
        if not -x.ndim <= a < x.ndim:
            raise ValueError(
                f"{operation}: {name}={value!r} is out of range for x.shape={x.shape}; an axis of "
                f"an array of rank {x.ndim} lies between {-x.ndim} and {x.ndim - 1}."
            )
    found = tuple(sorted(a % x.ndim for a in given))
    if len(set(found)) < len(found):
        raise ValueError(
            f"{operation}: {name}={value!r} names an axis of x.shape={x.shape} twice. "
            "Name each axis once."
        )
    return found


def parameter(operation: str, name: str, value, x, feature_axes: tuple[int, ...]) -> Array | None:
    """A scale or bias: None, or an array of the shape of the feature axes."""
    return None if value is None else statistic(operation, name, value, x, feature_axes)


def modulation(operation: str, name: str, value, x, feature_axes: tuple[int, ...]) -> Array | None:
    """A scale or bias of the feature axes' shape, or one of the rank of `x` that broadcasts to it.

    The second form is given per sample, say, computed from what the model is conditioned on.
    """
    if value is None:
        return None
    value = inexact(operation, name, value)
    expected = tuple(x.shape[a] for a in feature_axes)
    full = value.ndim == x.ndim and all(m in (1, n) for m, n in zip(value.shape, x.shape))
    if value.shape != expected and not full:
        raise ValueError(
            f"{operation}: scale and bias must have the shape of the feature axes, {expected}, "
            f"taken from x.shape={x.shape} at axis {_unpacked(feature_axes)}, or the rank of x and "
            f"1 or its size on every axis; got {name}.shape={value.shape}. If your features lie "
            f"elsewhere, say so: feature_axis=1, for example; one for each sample of shape (N, C) "
            f"needs axes of size 1: {name}[:, None, :]."
        )
    return value


def statistic(
    operation: str,
    name: str,
    value,
    x,
    feature_axes: tuple[int, ...],
    advice: str = "If your features lie elsewhere, say so: feature_axis=1, for example.",
) -> Array:
    """An array of the shape of the feature axes."""
    value = inexact(operation, name, value)
    expected = tuple(x.shape[a] for a in feature_axes)
    if value.shape != expected:
        raise ValueError(
            f"{operation}: scale, bias and statistics must have the shape of the feature axis, "
            f"{expected}, taken from x.shape={x.shape} at axis {_unpacked(feature_axes)}; got "
            f"{name}.shape={value.shape}. {advice}"
        )
    return value


def mask_of(operation: str, value, x):
    """A mask as booleans, checked to broadcast to `x`."""
    if value is None:
        return None
    if not (hasattr(value, "dtype") and hasattr(value, "shape")):
        raise TypeError(
            f"{operation}: mask must be an array; got {type(value).__name__} {_short(value)}. "
            "Convert it first: jnp.asarray(mask, bool)."
        )
    if value.dtype != jnp.bool_ and not jnp.issubdtype(value.dtype, jnp.number):
        raise TypeError(
            f"{operation}: mask must hold booleans (or numbers, where 0 leaves out); got "
            f"mask.dtype={value.dtype}. Convert it first: mask.astype(bool)."
        )
    fits = len(value.shape) <= x.ndim and all(
        m in (1, n) for m, n in zip(reversed(value.shape), reversed(x.shape))
    )
    if not fits:
        raise ValueError(
            f"{operation}: mask.shape={value.shape} does not broadcast to x.shape={x.shape}. "
            "Give each missing axis size 1: mask[..., None] for a mask without the last axis."
        )
    value = jnp.asarray(value)
    value = value if value.dtype == jnp.bool_ else value != 0
    return value.reshape((1,) * (x.ndim - value.ndim) + value.shape)


def number(operation: str, name: str, value, low: float, high: float, example: str) -> float:
    """A Python number in a closed interval."""
    real = isinstance(value, (int, float, np.floating, np.integer)) and not isinstance(value, bool)
    if not real:
        raise TypeError(
            f"{operation}: {name} must be a Python number, known when the function is traced; got "
            f"{type(value).__name__} {_short(value)}. For example {name}={example}."
        )
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"in [{low}, {high}]" if math.isfinite(high) else f"at least {low}, and finite"
        raise ValueError(
            f"{operation}: {name} must be {bounds}; got {name}={value}. For example "
            f"{name}={example}."
        )
    return float(value)


def decay_of(operation: str, value):
    """None, a Python number in [0, 1], or a scalar array (a schedule), which cannot be checked."""
    if value is None:
        return None
    value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    array = isinstance(value, jax.Array) and value.ndim == 0
    if array and jnp.issubdtype(value.dtype, jnp.floating):
        return value
    return number(operation, "decay", value, 0.0, 1.0, "0.99")


def flag(operation: str, name: str, value) -> bool:
    """An argument that must be a Python bool."""
    if not isinstance(value, bool):
        raise TypeError(
            f"{operation}: {name} must be a Python bool, known when the function is traced; got "
            f"{type(value).__name__} {_short(value)}. Pass True or False; under jax.jit make it a "
            f"static argument: jax.jit(f, static_argnames={name!r})."
        )
    return value


def not_empty(operation: str, x, reduced: tuple[int, ...]) -> None:
    """A slice must have an element."""
    # An axis of size 0 among the others is fine: there is no slice then, and nothing to do.
    if math.prod(x.shape[a] for a in reduced) == 0:
        raise ValueError(
            f"{operation}: there is nothing to take statistics of: x.shape={x.shape} has no "
            f"element over the reduced axes {reduced}. Skip empty arrays before this call."
        )


def groups_of(operation: str, num_groups, x, feature_axis: int) -> int:
    """A number of groups that divides the features."""
    features = x.shape[feature_axis]
    if isinstance(num_groups, bool) or not isinstance(num_groups, (int, np.integer)):
        raise TypeError(
            f"{operation}: num_groups must be an int; got {type(num_groups).__name__} "
            f"{_short(num_groups)}. For example num_groups=32."
        )
    if not isinstance(features, int) and features % num_groups != 0:  # a symbol
        raise ValueError(
            f"{operation}: num_groups must be known to divide a symbolic number of features; got "
            f"num_groups={num_groups} for x.shape={x.shape} at axis {feature_axis}. Export a "
            f'multiple of it: jax.export.symbolic_shape("{num_groups}*c").'
        )
    if num_groups <= 0 or features % num_groups:
        divisors = [d for d in range(1, features + 1) if features % d == 0]
        raise ValueError(
            f"{operation}: num_groups must divide the number of features, {features}, taken from "
            f"x.shape={x.shape} at axis {feature_axis}; got num_groups={num_groups}. Choose one of "
            f"{divisors if len(divisors) < 20 else [*divisors[:20], '...']}."
        )
    return int(num_groups)


def implementation_of(operation: str, value) -> bool:
    """True if the two-pass form is asked for; an unknown implementation is refused."""
    known = (None, "xla", "two_pass", "pallas")
    if value not in known:
        names = ", ".join(map(repr, known[1:]))
        raise ValueError(
            f"{operation}: implementation must be None (choose) or one of {names}; got "
            f"implementation={value!r}. Leave it at None."
        )
    return value == "two_pass"


def residual_of(operation: str, value, x) -> Array:
    """The array that is added to `x`: of its shape, never broadcast."""
    value = inexact(operation, "residual", value)
    if value.shape != x.shape:
        raise ValueError(
            f"{operation}: x and residual must have one shape; got x.shape={x.shape} and "
            f"residual.shape={value.shape}. If it is meant to be repeated, say so: "
            "jnp.broadcast_to(residual, x.shape)."
        )
    return value


def offset_of(operation: str, value, scale) -> float:
    """The number that is added to a scale; it must be 0 where there is no scale."""
    offset = number(operation, "scale_offset", value, float("-inf"), float("inf"), "1.0")
    if offset and scale is None:
        raise ValueError(
            f"{operation}: scale_offset={offset} is added to scale; got scale=None. Give a scale, "
            "or leave scale_offset at 0."
        )
    return offset


def activation_of(operation: str, value) -> Activation | None:
    """An elementwise function of one array, or None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{operation}: activation must be None or a function of one array; got "
            f"{type(value).__name__} {_short(value)}. For example activation=jax.nn.silu."
        )
    return None if value is None else Activation(operation, value)


def save_of(operation: str, value, *, activation, axis_name) -> Save:
    """The array that is kept for the backward pass, checked against what that excludes."""
    if value not in ("input", "output"):
        raise ValueError(
            f"{operation}: save must be 'input' or 'output'; got save={value!r}. Leave it at "
            "'input' unless the next operation keeps the result, as a matrix product does."
        )
    if value == "output" and activation is not None:
        raise ValueError(
            f"{operation}: an activation cannot be undone, so the backward pass needs the input; "
            f"got save='output' with activation={Activation(operation, activation).name}. Leave "
            "save='input', or apply the activation to the result."
        )
    if value == "output" and axis_name is not None:
        raise ValueError(
            f"{operation}: slices that go on over a named axis are recomputed from the input; got "
            f"save='output' with axis_name={axis_name!r}. Leave save='input'."
        )
    return value


def known_options(operation: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Names of options that are passed on to another function."""
    for name in given:
        if name not in known:
            raise TypeError(
                f"{operation}: the options are {', '.join(known)}; got {name}. Check its spelling."
            )


def result_dtype(operation: str, x, *parameters, dtype=None):
    """`dtype`, or what `x` and the parameters promote to: Flax's rule."""
    if dtype is None:
        return promoted(x, *(p for p in parameters if p is not None))
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{operation}: dtype must be a dtype, or its name; got {_short(dtype)}. For example "
            "dtype=jnp.bfloat16."
        ) from None
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{operation}: the result's dtype must be floating or complex; got "
            f"dtype={jnp.dtype(dtype)}. For example dtype=jnp.bfloat16."
        )
    if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{operation}: complex x.dtype={x.dtype} cannot be returned as "
            f"dtype={jnp.dtype(dtype)}. "
            "Leave dtype=None, or ask for a complex one."
        )
    return jnp.dtype(dtype)


def _unpacked(values: tuple[int, ...]):
    return values[0] if len(values) == 1 else values


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
