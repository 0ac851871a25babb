"""The edges of JAX: all that jaxnorm uses of it beyond its stable functions.

New primitives with their rules, walks over traced programs, and the types and contexts that tell
where a value lies. When a new version of JAX changes one of these, this file changes and no other;
a lint rule forbids their imports elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer
from jax.interpreters import ad, batching, mlir

if TYPE_CHECKING:
    from jax.extend.core import Jaxpr as Jaxpr
    from jax.extend.core import JaxprEqn as JaxprEqn
    from jax.extend.core import Literal as Literal
    from jax.extend.core import Primitive as Primitive
    from jax.extend.core import Var as Var

_OF_PROGRAMS = ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")


def __getattr__(name: str) -> Any:
    # Not imported above: it loads as much as all else that `import jaxnorm` loads.
    if name in _OF_PROGRAMS:
        from jax.extend import core

        return getattr(core, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Primitives.


def make_primitive(
    name: str,
    *,
    value: Callable,
    result: Callable,
    lowerings: Mapping[str | None, Callable],
    batch: Callable,
    jvp: Callable | None = None,
    transpose: Callable | None = None,
    several: bool = False,
) -> Primitive:
    """A primitive with the rules of every transformation that it supports.

    Args:
        name: as it stands in a traced program.
        value: `(*operands, **params) -> result`, outside of any transformation.
        result: `(*types, **params) -> type`, the abstract evaluation.
        lowerings: by platform; None is the default.
        batch: `(operands, axes, **params) -> (results, axes)`.
        jvp: `(primals, tangents, **params) -> (results, tangents)`; None where it has none.
        transpose: `(cotangents, *operands, **params) -> cotangents`, likewise.
        several: whether it returns a list of results.
    """
    from jax.extend.core import Primitive

    primitive = Primitive(name)
    primitive.multiple_results = several
    primitive.def_impl(value)
    primitive.def_abstract_eval(result)
    batching.primitive_batchers[primitive] = batch
    if jvp is not None:
        ad.primitive_jvps[primitive] = jvp
    if transpose is not None:
        ad.primitive_transposes[primitive] = transpose
    for platform, lowering in lowerings.items():
        mlir.register_lowering(primitive, lowering, platform=platform)
    return primitive


def lower_identity(context: Any, x: Any, *_: Any, **__: Any) -> list[Any]:
    """The lowering of a primitive that is its first operand."""
    return [x]


def lower(function: Callable, context: Any, *operands: Any, several: bool, **params: Any) -> Any:
    """Lower what a function computes, in place of a primitive."""
    return mlir.lower_fun(function, multiple_results=several)(context, *operands, **params)


def lowering(function: Callable) -> Callable:
    """The lowering of a primitive with one result: what a function of its operands computes."""

    def lowered(context: Any, *operands: Any, **params: Any) -> Any:
        return lower(function, context, *operands, several=False, **params)

    return lowered


def is_exported(context: Any) -> bool:
    """True while a program is lowered to be exported."""
    return context.module_context.lowering_parameters.for_export


def partitions(context: Any) -> int | None:
    """The number of devices over which the compiler partitions a program; None if it is unknown."""
    return getattr(context.module_context.axis_context, "num_devices", None)


def is_single_program(context: Any) -> bool:
    """True if a program is lowered for one platform and one device, with sizes that are known.

    Only then may what is lowered in place of a primitive have 64-bit numbers: the indices of
    platforms and of symbolic sizes, which are operands of all inner functions, have 32 bits.
    """
    module = context.module_context
    return partitions(context) == 1 and len(module.platforms) == 1 and not context.dim_var_values


def is_zero(tangent: Any) -> bool:
    """True for a tangent or cotangent that is known to be zero."""
    return type(tangent) is ad.Zero


def instantiated(tangents: Sequence[Any]) -> list[Any]:
    """Tangents or cotangents, with arrays for those that are known to be zero."""
    return [ad.instantiate_zeros(tangent) for tangent in tangents]


def is_linear(operand: Any) -> bool:
    """True for an operand of a transposition that a cotangent is wanted of."""
    return ad.is_undefined_primal(operand)


# Traced programs.


def is_traced(value: Any) -> bool:
    """True for a value that stands for another while a function is traced."""
    return isinstance(value, Tracer)


def inner_programs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs within an equation, such as the body of a loop."""
    from jax.extend.core import jaxprs_in_params

    return jaxprs_in_params(equation.params)


def run_program(program: Any, operands: Sequence[Any]) -> list[Any]:
    """The results of a closed program for these operands."""
    from jax.extend.core import jaxpr_as_fun

    return list(jaxpr_as_fun(program)(*operands))


def is_literal(atom: Any, value: Any) -> bool:
    """True for a number that stands in a program, if it is this one."""
    return hasattr(atom, "val") and bool(atom.val == value)


def read(values: Mapping[Any, Any], atoms: Sequence[Any]) -> list[Any]:
    """The values of variables, and of literals, which hold their own."""
    return [atom.val if hasattr(atom, "val") else values[atom] for atom in atoms]


def evaluate(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation for these operands."""
    primitive = equation.primitive
    with traced_under(equation):
        made = primitive.bind(*operands, **primitive.get_bind_params(equation.params))
    return list(made) if primitive.multiple_results else [made]


def dependencies(program: Jaxpr, results: Sequence[bool]) -> list[bool]:
    """For each operand of a program, whether any of these results needs it."""
    from jax.interpreters import partial_eval

    return list(partial_eval.dce_jaxpr(program, list(results), instantiate=False)[1])


def traced_under(equation: JaxprEqn) -> Any:
    """A context with the mesh and the options that an equation was traced under."""
    return equation.ctx.manager


def scan_operands(equation: JaxprEqn) -> tuple[int, int]:
    """The numbers of a scan's operands that are constants, and that are carried.

    Told by their ranks, since the parameters that say so have other names in each version of JAX.
    """
    inner = equation.params["jaxpr"].jaxpr

    def kept(outer: Any, inner: Any) -> int:
        return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner))

    carries = kept(equation.outvars, inner.outvars)
    return kept(equation.invars, inner.invars) - carries, carries


def functions_of_nn(equation: JaxprEqn) -> list[str]:
    """The functions of `jax.nn` that an equation was traced in, the outermost last."""
    traceback = equation.source_info.traceback
    frames = traceback.frames if traceback is not None else ()
    file = "jax/_src/nn/functions.py"
    return [f.function_name for f in frames if f.file_name.replace("\\", "/").endswith(file)]


# Types that tell where a value lies.


def manual_type(x: Any) -> Any:
    """The part of an array's type that tells how it varies over the axes of a `shard_map`."""
    return jax.typeof(x).mat


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes along which an array varies, as far as its type tells."""
    return manual_type(x).varying
