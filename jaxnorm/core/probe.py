"""An element of each slice, which tells roughly where the slice lies."""

import jax.numpy as jnp
from jax import lax

from jaxnorm.core.blocks import spec_of
from jaxnorm.core.slices import Slices


def element_of(slices: Slices, x, mask, *, in_block: bool):
    """A value inside the range of each slice, for one repeated value that value; 0 for none.

    It is the smallest element: of all, or of a few where all elements count and not all are at
    hand.
    """
    # Of axis 0 all are read: a batch is sharded over devices, and a few would have to travel.
    axes = tuple(a for a in slices.axes if a > 0)
    if mask is None and not in_block and _sliceable(x, axes):
        x = lax.slice(x, *_places(x.shape, axes))

    def smallest(part):
        infinity = jnp.asarray(jnp.inf, part.dtype)
        kept = part if mask is None else jnp.where(mask, part, infinity)
        found = slices.replicas.min(slices.reduce(jnp.min, kept))
        return found if mask is None else jnp.where(found == infinity, 0, found)

    if jnp.iscomplexobj(x):
        return lax.complex(smallest(jnp.real(x)), smallest(jnp.imag(x)))
    return smallest(x)


def _places(shape: tuple[int, ...], axes: tuple[int, ...]):
    """Start and end of a block of at most 16 places over the axes, in their middle.

    Neighbours: to fetch elements far apart, TPUs would copy all that lies between.
    """
    start, end = [0] * len(shape), list(shape)
    if not all(isinstance(shape[a], int) for a in axes):
        # A symbolic size (jax.export): all that is known is that there is a first place.
        return start, [1 if a in axes else n for a, n in enumerate(shape)]
    room = 16
    for left, a in zip(range(len(axes), 0, -1), sorted(axes, key=lambda a: shape[a])):
        number = min(shape[a], max(1, round(room ** (1 / left))))
        room //= number
        start[a] = (shape[a] - number) // 2
        end[a] = start[a] + number
    return start, end


def _sliceable(x, axes: tuple[int, ...]) -> bool:
    """True if the type of `x` shards none of these axes over an Explicit mesh."""
    spec = spec_of(x)
    return all(spec[a] is None for a in axes)
