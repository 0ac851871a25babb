"""The search for nonlinearities in a traced program.

Models call them as plain functions, so there is nothing to hook into: they are found in the
equations. Most of them are compiled functions that bear their name; one that JAX writes out in
line is told by the traceback of its equations; and some are primitives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jaxnorm._jax import Jaxpr, JaxprEqn, Var, functions_of_nn, is_literal

# Elementwise functions of `jax.nn`.
NAMES = {
    *("celu", "elu", "gelu", "glu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu"),
    *("log_sigmoid", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "soft_sign", "softplus"),
    *("sparse_plus", "sparse_sigmoid", "squareplus"),
}
PRIMITIVES = {"tanh": "tanh", "logistic": "sigmoid", "erf": "erf"}


class Nonlinearity(NamedTuple):
    """Consecutive equations that compute one nonlinearity.

    Attributes:
        name: the function, such as "relu".
        start: index of the first equation in the program.
        stop: index after the last one.
        input: the array that goes in.
        output: the array that comes out.
    """

    name: str
    start: int
    stop: int
    input: Var
    output: Var


def nonlinearities(jaxpr: Jaxpr) -> Iterator[Nonlinearity]:
    """Find the nonlinearities of a program in order, without the programs within it."""
    start = 0
    while start < len(jaxpr.eqns):
        name, stop = _written_out(jaxpr.eqns, start)
        if name is None:
            name, stop = _name(jaxpr.eqns[start]), start + 1
        if name is not None:
            ends = _ends(jaxpr, start, stop)
            if ends is not None:
                yield Nonlinearity(name, start, stop, *ends)
        start = stop


def _name(eqn: JaxprEqn) -> str | None:
    """The nonlinearity that one equation computes."""
    kind = eqn.primitive.name
    if kind in ("jit", "pjit"):
        return eqn.params["name"] if eqn.params["name"] in NAMES else None
    if kind == "custom_jvp_call":
        inner = eqn.params["call_jaxpr"].jaxpr.eqns
        return _name(inner[0]) if len(inner) == 1 else None
    if kind == "max" and any(is_literal(v, 0) for v in eqn.invars):
        return "relu"
    return PRIMITIVES.get(kind)


def _written_out(eqns: list[JaxprEqn], start: int) -> tuple[str | None, int]:
    """A function of `jax.nn` whose equations stand here one by one, and where they end."""
    name = stop = None
    for stop in range(start, len(eqns)):
        here = _caller(eqns[stop])
        if here is None or (name is not None and here != name):
            break
        name = here
    else:
        stop = len(eqns)
    return (name, stop) if name is not None else (None, start + 1)


def _caller(eqn: JaxprEqn) -> str | None:
    """The outermost function of `jax.nn` that an equation was traced in."""
    names = functions_of_nn(eqn)
    return names[-1] if names and names[-1] in NAMES else None


def _ends(jaxpr: Jaxpr, start: int, stop: int) -> tuple[Var, Var] | None:
    """The array that goes in and the array that comes out, if there is one of each."""
    eqns = jaxpr.eqns[start:stop]
    computed = {v for eqn in eqns for v in eqn.outvars}
    arrays = [v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in computed]
    given = {v for v in arrays if _is_activation(v)}
    used = {v for eqn in jaxpr.eqns[stop:] for v in eqn.invars if isinstance(v, Var)}
    used |= {v for v in jaxpr.outvars if isinstance(v, Var)}
    results = {v for v in computed if v in used and _is_activation(v)}
    return (given.pop(), results.pop()) if len(given) == len(results) == 1 else None


def _is_activation(v: Var) -> bool:
    shape, dtype = getattr(v.aval, "shape", ()), getattr(v.aval, "dtype", jnp.int32)
    return bool(shape) and jnp.issubdtype(dtype, jnp.floating)
