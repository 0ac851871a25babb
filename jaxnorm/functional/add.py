"""A residual connection and the normalization after it, in one."""

from typing import Unpack

from jaxtyping import Array, Inexact

from jaxnorm.core import arguments as check
from jaxnorm.core.moments import promoted
from jaxnorm.functional.prepare import LayerOptions, trailing_norm


def add_layer_norm(
    x: Inexact[Array, "*shape"],
    residual: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    bias: Inexact[Array, "..."] | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    r"""Layer normalization of a sum, and the sum, which the next residual connection needs.

    .. math::
        t = x + r, \quad y = \gamma \frac{t - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the mean and biased variance of each slice of t. The backward pass keeps t, or y with
    ``save="output"``, and neither `x` nor `residual`.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape.
        residual: r, of the shape of `x`; it is never broadcast.
        scale: gamma, as in `layer_norm`.
        bias: beta, likewise.
        **options: those of `layer_norm`.

    Returns:
        `y` and t, both of the shape of `x`. t is rounded once to the dtype that `x` and `residual`
        promote to; `y` is the normalization of that, in the dtype which t, scale and bias promote
        to, or in `dtype`. Where a sum exceeds the largest number of its dtype (65504 in float16), t
        is infinite there, and `y` NaN in that slice.

    Raises:
        TypeError: as `layer_norm`, for `residual` too.
        ValueError: as `layer_norm`; also a `residual` of another shape.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, table 1.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> x, residual = jnp.array([1.0, 1.0, 1.0]), jnp.array([0.0, 1.0, 2.0])
        >>> y, total = jaxnorm.add_layer_norm(x, residual, epsilon=0.0)
        >>> print(y.round(3), total)
        [-1.225  0.     1.225] [1. 2. 3.]
    """
    op = "add_layer_norm"
    x, residual = _summands(op, x, residual, options)
    return trailing_norm(op, x, scale, bias, residual=residual, **options)


def add_rms_norm(
    x: Inexact[Array, "*shape"],
    residual: Inexact[Array, "*shape"],
    scale: Inexact[Array, "..."] | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Inexact[Array, "*shape"], Inexact[Array, "*shape"]]:
    r"""Root mean square normalization of a sum, and the sum.

    .. math::
        t = x + r, \quad y = (\text{offset} + \gamma) \frac{t}{\sqrt{\langle |t|^2 \rangle +
        \epsilon}}

    The backward pass keeps t, or y with ``save="output"``, and neither `x` nor `residual`.

    Args:
        x: float16, bfloat16, float32, float64 or complex, any shape.
        residual: r, of the shape of `x`; it is never broadcast.
        scale: gamma, as in `rms_norm`.
        **options: those of `rms_norm`.

    Returns:
        `y` and t, as `add_layer_norm`.

    Raises:
        TypeError: as `rms_norm`, for `residual` too.
        ValueError: as `rms_norm`; also a `residual` of another shape.

    Source: Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019, equation (4), where
    Touvron et al., "LLaMA", 2023, section 2.2, places it.

    Example:
        >>> import jax.numpy as jnp, jaxnorm
        >>> y, total = jaxnorm.add_rms_norm(jnp.array([2.0, 2.0]), jnp.array([1.0, 2.0]))
        >>> [round(v, 3) for v in y.tolist()], total.tolist()
        ([0.849, 1.131], [3.0, 4.0])
    """
    op = "add_rms_norm"
    x, residual = _summands(op, x, residual, options)
    return trailing_norm(op, x, scale, None, residual=residual, centered=False, **options)


def _summands(op: str, x, residual, options):
    check.known_options(op, options, LayerOptions.__annotations__)
    x = check.inexact(op, "x", x)
    residual = check.residual_of(op, residual, x)
    dtype = promoted(x, residual)
    return x.astype(dtype), residual.astype(dtype)
