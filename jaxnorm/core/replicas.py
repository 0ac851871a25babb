"""Who else holds a part of the slices whose moments are taken.

`core` only needs these verbs. The base class is the case of one device; `jaxnorm.distributed`
gives the same verbs a named axis.
"""

from dataclasses import dataclass

from jaxtyping import Array


@dataclass(frozen=True)
class Alone:
    """Every slice lies whole in the array at hand: nothing to combine."""

    mapped = False
    """Whether they are examples of a `vmap`.

    JAX traces a rule of differentiation late, when such an axis may have lost its name. What has
    such a rule must then stand in no `jit`, `checkpoint` or `cond` of its own, nor hold one.
    """

    def size(self) -> int | Array:
        """The number of replicas that share statistics."""
        return 1

    def sum(self, *arrays: Array) -> tuple[Array, ...]:
        """Sums of arrays of one shape, in one collective."""
        return arrays

    def min(self, array: Array) -> Array:
        """Elementwise minimum over the replicas."""
        return array

    def agreed(self, condition: Array) -> Array:
        """The condition, made true only where it is for all who will meet in a collective."""
        return condition


ALONE = Alone()
