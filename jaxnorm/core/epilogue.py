"""The epilogue of a normalization: scale, shift, an activation, and the one rounding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from jaxnorm.core.moments import promoted, wide_dtype


@dataclass(frozen=True)
class Activation:
    """An elementwise function, checked when it is traced: as a whole it must keep the shape."""

    operation: str
    function: Callable

    def __call__(self, y: Inexact[Array, "*shape"]) -> Inexact[Array, "*shape"]:
        """The function of `y`, or an error in the name of the operation."""
        out = self.function(y)
        kept = getattr(out, "shape", None) == y.shape and jnp.issubdtype(out.dtype, jnp.inexact)
        if not kept or (jnp.iscomplexobj(out) and not jnp.iscomplexobj(y)):
            shaped = hasattr(out, "dtype") and hasattr(out, "shape")
            described = f"{out.dtype}{list(out.shape)}" if shaped else type(out).__name__
            raise ValueError(
                f"{self.operation}: activation must be elementwise, from floating numbers to such; "
                f"got {self.name}, which maps {y.dtype}{list(y.shape)} to {described}. Apply what "
                "is not elementwise to the result."
            )
        return out

    @property
    def name(self) -> str:
        """The function's name as an error shows it."""
        return getattr(self.function, "__name__", repr(self.function))

    @property
    def is_constant(self) -> bool:
        """True for one of JAX's own functions, which hold no values of their own.

        What else is called may hold some that are traced, or that change from call to call.
        """
        of_jax = getattr(self.function, "__module__", None) or ""
        holds = hasattr(self.function, "__self__") or not hasattr(self.function, "__name__")
        return of_jax.startswith("jax.") and not holds


def affine(xhat, factor, shift):
    """``xhat * factor + shift`` in the dtype of these; None for one and for zero."""
    y = xhat if factor is None else xhat.astype(factor.dtype) * factor
    return y if shift is None else y.astype(shift.dtype) + shift


@dataclass(frozen=True)
class Epilogue:
    """``activation(xhat * (scale_offset + scale) + bias)`` in `dtype`: the static half of it."""

    dtype: jax.typing.DTypeLike
    scale_offset: float = 0.0
    activation: Activation | None = None

    def __call__(
        self,
        xhat: Inexact[Array, "*shape"],
        scale: Inexact[Array, "*#shape"] | None,
        bias: Inexact[Array, "*#shape"] | None,
    ) -> Inexact[Array, "*shape"]:
        """Computed in the wider of both dtypes, rounded once."""
        factor, shift = self.parameters(xhat, scale, bias)
        return self.rounded(affine(xhat, factor, shift))

    def parameters(self, x, scale, bias):
        """The factor and the summand of xhat, in the dtype that both are computed in."""
        wide = promoted(wide_dtype(x.dtype), self.dtype)
        factor = None if scale is None else self.factor(scale, wide)
        return factor, None if bias is None else bias.astype(wide)

    def rounded(self, y):
        """The activation, and the one rounding."""
        y = y.astype(promoted(y.dtype, self.dtype))
        if self.activation is not None:
            y = self.activation(y)
        return y.astype(self.dtype)

    def factor(self, scale: Inexact[Array, "*sizes"], wide) -> Inexact[Array, "*sizes"]:
        """``scale_offset + scale``, widened before: in bfloat16, 1 + w rounds w to 8 bits."""
        return scale.astype(wide) + self.scale_offset if self.scale_offset else scale.astype(wide)

    @property
    def is_constant(self) -> bool:
        """True if a trace made with it may be used again."""
        return self.activation is None or self.activation.is_constant


@overload
def along(parameter: None, feature_axes: tuple[int, ...], ndim: int) -> None: ...
@overload
def along(parameter: Array, feature_axes: tuple[int, ...], ndim: int) -> Array: ...
def along(parameter, feature_axes, ndim):
    """A parameter of the feature axes' shape, with size 1 on all other axes of a rank `ndim`.

    One of rank `ndim` is given for each sample (or whatever its other sizes say), and fits already.
    """
    if parameter is None or parameter.ndim == ndim:
        return parameter
    sizes = dict(zip(feature_axes, parameter.shape, strict=True))
    return parameter.reshape([sizes.get(a, 1) for a in range(ndim)])
