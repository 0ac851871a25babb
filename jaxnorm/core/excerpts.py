"""Parts of a slice that tell roughly where it lies, read before all of it is."""

import jax.numpy as jnp
from jax import lax

from jaxnorm.core.blocks import spec_of


def element_of(reduction, x, mask):
    """A value inside the range of each slice, for one repeated value that value; 0 for none.

    The smallest: of a few elements where all count and they can be fetched for nothing.
    """
    # Of axis 0 all are read: a batch is spread over devices, and a few would have to travel.
    axes = tuple(a for a in reduction.axes if a > 0)
    if mask is None and not reduction.at_hand and _sliceable(x, axes):
        x = lax.slice(x, *_places(x.shape, axes))

    def smallest(part):
        infinity = jnp.asarray(jnp.inf, part.dtype)
        kept = part if mask is None else jnp.where(mask, part, infinity)
        found = reduction.replicas.min(reduction.over(jnp.min, kept))
        return found if mask is None else jnp.where(found == infinity, 0, found)

    if jnp.iscomplexobj(x):
        return lax.complex(smallest(jnp.real(x)), smallest(jnp.imag(x)))
    return smallest(x)


def sample_of(reduction, x):
    """An eighth of each slice or more, from its middle, and one of its elements.

    The mean of a part f of a slice lies within ``sqrt((1 - f) / f)`` deviations of the slice's: at
    an eighth the subtraction in ``mean(z^2) - mean(z)^2`` costs three bits at worst.
    """
    axes = [a for a in reduction.axes if a > 0 and _sliceable(x, (a,))]
    start, end = [0] * x.ndim, list(x.shape)
    for a in axes[:1]:
        length = -(-x.shape[a] // 8)
        start[a] = (x.shape[a] - length) // 2
        end[a] = start[a] + length
    sample = lax.slice(x, start, end)
    for a in axes:
        end[a] = start[a] + 1
    return sample, reduction.over(jnp.min, lax.slice(x, start, end))


def _places(shape: tuple[int, ...], axes: tuple[int, ...]):
    """Start, end and stride of a grid of at most 16 places over the axes, away from the edges."""
    start, end, stride = [0] * len(shape), list(shape), [1] * len(shape)
    if not all(isinstance(shape[a], int) for a in axes):
        # A symbolic size (jax.export): all that is known is that there is a first place.
        return start, [1 if a in axes else n for a, n in enumerate(shape)], stride
    room = 16
    for left, a in zip(range(len(axes), 0, -1), sorted(axes, key=lambda a: shape[a])):
        number = min(shape[a], max(1, round(room ** (1 / left))))
        room //= number
        stride[a] = shape[a] // number
        span = stride[a] * (number - 1)
        start[a] = (shape[a] - 1 - span) // 2
        end[a] = start[a] + span + 1
    return start, end, stride


def _sliceable(x, axes: tuple[int, ...]) -> bool:
    """True if the type of `x` shards none of these axes over an Explicit mesh."""
    spec = spec_of(x)
    return all(spec[a] is None for a in axes)
