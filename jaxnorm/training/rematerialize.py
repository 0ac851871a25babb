"""Less memory for the backward pass of any function: keep a few values and recompute the others.

`jax.checkpoint` around a whole forward pass saves nothing: the backward pass begins with the whole
recomputation, and then holds all the values after all. It must be applied to segments of the
function, one after another, and most models do not say where their segments begin and end. So this
module finds the segments. It traces the function and cuts it where the fewest bytes are alive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxnorm._jax import Jaxpr, JaxprEqn, Var, evaluate, inner_programs, read
from jaxnorm.core.normalize import MOMENTS

Function = TypeVar("Function", bound=Callable[..., Any])

# Statistics are kept within a segment too. They are small, and over a mesh each is a collective.
_REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "argmax", "argmin"),
    *("psum", "psum_invariant", "pmin", "pmax"),
}
_statistics = jax.checkpoint_policies.save_from_both_policies(
    lambda primitive, *_, **__: primitive.name in _REDUCTIONS,
    jax.checkpoint_policies.save_only_these_names(MOMENTS),
)


def in_segments(function: Function) -> Function:
    """`function` in segments: its backward pass keeps the values between segments, and statistics.

    With n layers there are about sqrt(n) segments. Then the values between the segments and the
    values within one segment take about the same memory (Chen et al. 2016, arXiv:1604.06174,
    section 4).
    """

    def run(*args: Any) -> Any:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.invars, jax.tree.leaves(args)))
        values |= dict(zip(jaxpr.constvars, closed.consts))
        for segment in _segments(jaxpr):
            compute = jax.checkpoint(segment.compute, policy=_statistics)
            results = compute(*(values[v] for v in segment.inputs))
            values |= dict(zip(segment.outputs, results))
        outputs = read(values, jaxpr.outvars)
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run  # type: ignore[return-value]


class _Segment(NamedTuple):
    """Consecutive equations, as a function of the results of earlier ones."""

    equations: list[JaxprEqn]
    inputs: list[Var]
    outputs: list[Var]

    def compute(self, *args: Any) -> list[Any]:
        values = dict(zip(self.inputs, args))
        for eqn in self.equations:
            given = read(values, eqn.invars)
            values |= dict(zip(eqn.outvars, evaluate(eqn, given)))
        return [values[v] for v in self.outputs]


def _segments(jaxpr: Jaxpr) -> list[_Segment]:
    """All equations of `jaxpr`, divided into segments."""
    cuts = [0, *_cuts(jaxpr), len(jaxpr.eqns)]
    needed = _variables(jaxpr.outvars)
    segments: list[_Segment] = []
    for start, end in reversed(list(itertools.pairwise(cuts))):
        eqns = jaxpr.eqns[start:end]
        defined = _variables(v for eqn in eqns for v in eqn.outvars)
        used = _variables(v for eqn in eqns for v in eqn.invars)
        inputs = [v for v in used if v not in defined]
        outputs = [v for v in defined if v in needed]
        segments.insert(0, _Segment(eqns, inputs, outputs))
        needed = dict.fromkeys([*(v for v in needed if v not in defined), *inputs])
    return segments


def _cuts(jaxpr: Jaxpr) -> list[int]:
    """The positions of the cuts: equal shares of the work, moved to where the fewest bytes live."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    computed, alive = np.zeros(len(jaxpr.eqns)), np.zeros(len(jaxpr.eqns) + 1)
    for i, eqn in enumerate(jaxpr.eqns):
        for v in _variables(eqn.outvars):
            size = getattr(v.aval, "size", 0) * getattr(getattr(v.aval, "dtype", 0), "itemsize", 1)
            computed[i] += size
            alive[i + 1 : last.get(v, i) + 1] += size
    layers = sum(map(_products, jaxpr.eqns))
    count = max(1, math.ceil(math.sqrt(layers)))
    share = np.cumsum(computed) / max(computed.sum(), 1) * count  # segments after each equation
    cuts = []
    for middle in range(1, count):
        near = np.flatnonzero(abs(share - middle) < 0.5) + 1
        if near.size:
            cuts.append(int(near[alive[near].argmin()]))
    return cuts


def _products(eqn: JaxprEqn) -> int:
    """The number of matrix products and convolutions in an equation."""
    inner = sum(_products(e) for sub in inner_programs(eqn) for e in sub.eqns)
    return inner + (eqn.primitive.name in ("dot_general", "conv_general_dilated"))


def _variables(atoms: Any) -> dict[Var, None]:
    """The variables among literals and variables, each once and in order."""
    return dict.fromkeys(v for v in atoms if isinstance(v, Var))
