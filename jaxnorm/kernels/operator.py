"""Kernels as operators that every JAX transformation can work on.

Three primitives: a norm's value, the map of its tangents, and that map's transpose. Values and
transposes are kernels. The tangents' map and the derivatives of all three are computed by `core`,
so that forward mode and higher derivatives are as right as they are there. Between the passes `x`
is kept.

A bare `custom_vjp` around a kernel would forbid forward mode.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from jaxnorm._jax import Primitive, instantiated, is_linear, is_zero, make_primitive
from jaxnorm.kernels.block import KernelNorm
from jaxnorm.kernels.platforms import lowerings


@dataclass(frozen=True)
class KernelCall:
    """The static half of a primitive's operands: which of them there are."""

    norm: KernelNorm
    has_scale: bool
    has_bias: bool
    adds: bool
    """Whether a residual is added first, so that the sum is a result too."""

    def parameters(self, given) -> tuple[Array | None, Array | None]:
        """Scale and bias, with None for the one that is not given."""
        some = iter(given)
        return (next(some) if self.has_scale else None, next(some) if self.has_bias else None)

    @property
    def count(self) -> int:
        """The number of parameters, scale and bias."""
        return self.has_scale + self.has_bias

    def with_leading_axis(self) -> "KernelCall":
        """This call for arrays with one more axis in front."""
        return replace(self, norm=self.norm.with_leading_axis())


def run_kernel(
    norm: KernelNorm,
    x: Inexact[Array, "*shape"],
    residual: Inexact[Array, "*shape"] | None,
    scale: Inexact[Array, "*#shape"] | None,
    bias: Inexact[Array, "*#shape"] | None,
) -> tuple[Array, ...]:
    """``(y,)``, or ``(y, x + residual)``; parameters have the rank of `x`."""
    call = KernelCall(norm, scale is not None, bias is not None, residual is not None)
    large = [x] if residual is None else [x, residual]
    given = [p for p in (scale, bias) if p is not None]
    return tuple(_value(call, large, given))


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _value(call: KernelCall, large, given):
    return value_p.bind(*large, *given, call=call)


@_value.defjvp
def _value_jvp(call: KernelCall, primals, tangents):
    (large, given), (dlarge, dgiven) = primals, tangents
    results = _value(call, large, given)
    x, dx = (large[0], dlarge[0]) if not call.adds else (results[1], dlarge[0] + dlarge[1])
    return results, push_p.bind(x, *given, dx, *dgiven, call=call)


# What the primitives compute, by `core`: XLA's form.


def xla_value(call: KernelCall, x: Array, *rest: Array) -> list[Array]:
    """The value y, and the sum where there is one."""
    if not call.adds:
        return [call.norm.xla_value(x, *call.parameters(rest))]
    total = x + rest[0]
    return [call.norm.xla_value(total, *call.parameters(rest[1:])), total]


def _of(call: KernelCall, x: Array, *given: Array) -> Array:
    return call.norm.xla_value(x, *call.parameters(given))


def xla_push(call: KernelCall, *operands: Array) -> list[Array]:
    """The tangent dy, and dx where `x` is a result too, from `x`, parameters and their tangents."""
    primals, tangents = operands[: call.count + 1], operands[call.count + 1 :]
    dy = jax.jvp(partial(_of, call), primals, tangents)[1]
    return [dy, tangents[0]] if call.adds else [dy]


def xla_pull(call: KernelCall, *operands: Array) -> list[Array]:
    """Cotangents of `x` and the parameters, from these and the cotangents of the results."""
    primals, (dy, *dtotal) = operands[: call.count + 1], operands[call.count + 1 :]
    dx, *dgiven = jax.vjp(partial(_of, call), *primals)[1](dy)
    return [dx + dtotal[0] if dtotal else dx, *dgiven]


def _kernel_value(kernels, call: KernelCall, x: Array, *rest: Array):
    residual, given = (rest[0], rest[1:]) if call.adds else (None, rest)
    return kernels.forward(call.norm, x, residual, *call.parameters(given))


def _kernel_pull(kernels, call: KernelCall, *operands: Array):
    x, *given = operands[: call.count + 1]
    dy, *dtotal = operands[call.count + 1 :]
    return kernels.backward(call.norm, x, call.parameters(given), dy, *(dtotal or [None]))


def _primitive(name: str, xla, kernel, results, transpose=None) -> Primitive:
    def value(*operands, call):
        return _compiled(primitive, call, *operands)

    def tangents(primals, tangents, *, call):
        return jax.jvp(partial(xla, call), tuple(primals), tuple(instantiated(tangents)))

    def batched(operands, batch_axes, *, call):
        (size,) = {o.shape[p] for o, p in zip(operands, batch_axes) if p is not None}
        # Parameters too: each example then has its own, and its own derivatives of them.
        operands = [
            jnp.broadcast_to(o, (size, *o.shape)) if p is None
            else jnp.moveaxis(o, p, 0)
            for o, p in zip(operands, batch_axes)
        ]  # fmt: skip
        out = primitive.bind(*operands, call=call.with_leading_axis())
        return out, [0] * len(out)

    primitive = make_primitive(
        f"jaxnorm_{name}",
        several=True,
        value=value,
        result=lambda *avals, call: results(call, *avals),
        jvp=tangents,
        transpose=transpose,
        batch=batched,
        lowerings=lowerings(kernel, xla),
    )
    return primitive


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(primitive, call, *operands):
    return primitive.bind(*operands, call=call)


def _like(aval, dtype=None):
    return aval.update(dtype=jnp.dtype(aval.dtype if dtype is None else dtype), weak_type=False)


def _results(call: KernelCall, x, *_) -> list[Any]:
    y = _like(x, call.norm.epilogue.dtype)
    return [y, _like(x)] if call.adds else [y]


def _transposed(cotangents, *operands, call: KernelCall):
    primals = operands[: call.count + 1]
    if call.adds and is_zero(cotangents[1]):
        call, cotangents = replace(call, adds=False), cotangents[:1]
    out = pull_p.bind(*primals, *instantiated(cotangents), call=call)
    return [None] * len(primals) + [
        d if is_linear(o) else None for d, o in zip(out, operands[len(primals) :])
    ]


value_p = _primitive("value", xla_value, _kernel_value, _results)
push_p = _primitive("push", xla_push, None, _results, _transposed)
pull_p = _primitive(
    "pull", xla_pull, _kernel_pull,
    lambda call, *avals: [_like(a) for a in avals[: call.count + 1]],
)  # fmt: skip
