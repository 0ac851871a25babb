"""Tell the TPU compiler how an array that is reduced lies in memory."""

from collections.abc import Sequence
from functools import cache

from jax.experimental.layout import Layout, with_layout_constraint
from jax.interpreters import batching, mlir
from jaxtyping import Array


def in_order(x: Array, axes: Sequence[int]) -> Array:
    """An equal array; on TPUs its axes lie in memory in that order, the last one contiguous.

    Other compilers are told nothing: theirs lie so anyway. Nor is it said where there is more than
    one device: XLA for CPUs, and that for pods of TPU v5p, gathers what such a constraint is put
    on. It has no derivative, and is for what computes moments only.
    """
    return _primitive().bind(x, axes=tuple(axes))


@cache
def _primitive():
    # Imported here, since it loads as much as all else that jaxnorm imports.
    from jax.extend.core import Primitive

    primitive = Primitive("jaxnorm_in_order")
    primitive.def_impl(lambda x, axes: x)
    primitive.def_abstract_eval(lambda x, axes: x)
    batching.primitive_batchers[primitive] = _batched
    mlir.register_lowering(primitive, lambda context, x, axes: [x])
    mlir.register_lowering(primitive, _constrained, platform="tpu")
    return primitive


def _constrained(context, x, *, axes):
    module = context.module_context
    if module.lowering_parameters.for_export:
        return [x]  # what is exported must be stable, which JAX does not promise of a constraint
    if getattr(module.axis_context, "num_devices", None) != 1:
        return [x]

    def constrain(x, axes):
        return with_layout_constraint(x, Layout(axes))

    return mlir.lower_fun(constrain, multiple_results=False)(context, x, axes=axes)


def _batched(operands, places, *, axes):
    (x,), (place,) = operands, places
    behind = (place, *(a + (a >= place) for a in axes))
    return in_order(x, behind), place
