"""The replicas that hold parts of the slices whose moments are measured.

`core` only needs these verbs. The base class is the case of one device; `jaxnorm.distributed`
gives the same verbs a named axis.
"""

from dataclasses import dataclass

from jaxtyping import Array


@dataclass(frozen=True)
class Replicas:
    """A single replica: every slice lies whole in one array, and nothing is to be combined."""

    mapped = False
    """Whether they are examples of a `vmap`.

    JAX traces a rule of differentiation late, when such an axis may have lost its name. What has
    such a rule must then stand in no `jit`, `checkpoint` or `cond` of its own, nor hold one.
    """

    @property
    def is_single(self) -> bool:
        """True if no other replica holds a part of a slice."""
        return type(self) is Replicas

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
        """The condition, true only where it is so for all that will meet in a collective."""
        return condition


SINGLE = Replicas()
