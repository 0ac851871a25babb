"""Reasons why there is no kernel for a call."""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxnorm.kernels.block import KernelNorm
from jaxnorm.kernels.meshes import sharded_along
from jaxnorm.kernels.platforms import PLANS


@dataclass(frozen=True)
class Request:
    """A call as kernels see it; why none can run it is found out when it is asked for."""

    norm: KernelNorm
    x: Any
    """The type of `x`, which outlives the trace that `x` belongs to."""
    parameters: tuple[Any, ...]
    """The types of those of scale and bias that are given; they have the rank of `x`."""
    masked: bool
    save: str

    @classmethod
    def of(
        cls, operation: str, x: Array, parameters, *, measurement, epilogue, mask, save
    ) -> "Request":
        """The request for a call with these arrays and with the options of `core.layer`."""
        types = tuple(jax.typeof(p) for p in parameters if p is not None)
        norm = KernelNorm(operation, measurement, epilogue)
        return cls(norm, jax.typeof(x), types, mask is not None, save)

    @cached_property
    def unsupported(self) -> str | None:
        """The reason why no platform has a kernel; None if some may have one."""
        norm, x = self.norm, self.x
        whole = (*norm.axes, *norm.split_axes)
        epilogue = norm.epilogue
        # A reason each, with a condition that is only evaluated when those before do not hold.
        reasons = {
            "it takes no mask": lambda: self.masked,
            "a slice lies on several devices (axis_name)": lambda: norm.crosses_devices,
            f"it computes in float32, not in {x.dtype}": lambda: _is_wide(x),
            "scale and bias are wider than float32": lambda: any(map(_is_wide, self.parameters)),
            "the result is wider than float32": lambda: jnp.dtype(epilogue.dtype).itemsize > 4,
            "it keeps the input (save='output')": lambda: self.save != "input",
            "an activation must be one of jax.nn's functions": lambda: not epilogue.is_constant,
            "groups lie along the last axis": lambda: norm.split_axes not in ((), (x.ndim - 1,)),
            "a size is symbolic": lambda: not all(isinstance(n, int) for n in x.shape),
            "x has no element": lambda: 0 in x.shape,
            f"axes {whole} are sharded over devices": lambda: bool(sharded_along(x, whole)),
        }
        return next((reason for reason, holds in reasons.items() if holds()), None)

    def unsupported_on(self, platform: str) -> str | None:
        """The reason why that platform has none for a call that some may have; None if it has."""
        plan = import_module(PLANS[platform])
        shapes = [p.shape for p in self.parameters]
        return plan.refusal(self.norm, self.x.shape, self.x.dtype, shapes)


def _is_wide(array: Any) -> bool:
    return array.dtype.itemsize > 4 or jnp.issubdtype(array.dtype, jnp.complexfloating)
