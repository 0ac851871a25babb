"""The layout that compilers for TPUs are told of an array whose rows are reduced."""

from functools import cache

from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from jaxnorm._jax import is_exported, lower, lower_identity, make_primitive, partitions


def row_major(x: Array) -> Array:
    """An equal array; on TPUs its last axis is contiguous in memory, and so on to the first.

    Left to choose, XLA for TPUs lays whole networks out by columns around the sums of rows, and
    copies what enters and leaves them. Other compilers are told nothing: theirs lie so anyway. Nor
    is it said where there is more than one device: XLA for CPUs, and that for pods of TPU v5p,
    gathers what such a constraint is put on. It has no derivative, and is for what computes moments
    only.
    """
    return _primitive().bind(x, axes=tuple(range(x.ndim)))


@cache
def _primitive():
    # Made when it is first used: what primitives are made of takes long to load.
    return make_primitive(
        "jaxnorm_row_major",
        value=lambda x, axes: x,
        result=lambda x, axes: x,
        batch=_batched,
        lowerings={None: lower_identity, "tpu": _constrained},
    )


def _constrained(context, x, *, axes):
    if is_exported(context):
        return [x]  # what is exported must be stable, which JAX does not promise of a constraint
    if partitions(context) != 1:
        return [x]

    def constrain(x, axes):
        return with_layout_constraint(x, Layout(axes))

    return lower(constrain, context, x, axes=axes, several=False)


def _batched(operands, places, *, axes):
    (x,), (place,) = operands, places
    axes = (place, *(a + (a >= place) for a in axes))
    return _primitive().bind(x, axes=axes), place
