"""Virtual batches: how many examples share their statistics, on any number of devices."""

from dataclasses import replace

import numpy as np

from jaxnorm.core.replicas import SINGLE
from jaxnorm.core.slices import Slices
from jaxnorm.distributed.axes import NamedAxis, grouped


def virtual_batches(operation: str, size: int, shape: tuple[int, ...], slices: Slices) -> Slices:
    """Slices of each `size` examples, made from slices of the whole batch.

    `slices` are over all axes of a batch except the feature axes. Examples lie along the first of
    these axes and continue over the replicas, in order of index.

    Raises:
        TypeError: `size` is not an int.
        ValueError: neither is a replica's share of the batch a multiple of `size`, nor `size` a
            multiple of the share; or the replicas cannot be grouped into that many shares.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(
            f"{operation}: virtual_batch_size must be an int, a number of examples; got "
            f"{type(size).__name__} {size!r}. For example virtual_batch_size=32."
        )
    replicas = slices.replicas
    members = replicas.members if isinstance(replicas, NamedAxis) else 1
    # If the batch has no axis of its own, each member of the named axis holds one example.
    axis = slices.axes[0] if slices.axes else None
    share = 1 if axis is None else shape[axis]
    if size > 0 and axis is not None and share % size == 0:
        others = tuple(a for a in slices.axes if a != axis)
        return replace(slices, axes=others, blocks=(axis, share // size), replicas=SINGLE)
    if not isinstance(share, int):
        raise ValueError(
            f"{operation}: virtual_batch_size must be known to divide a batch of symbolic size; "
            f"got virtual_batch_size={size} for x.shape={shape}. Export a multiple of it: "
            f'jax.export.symbolic_shape("{size}*b").'
        )
    if size > 0 and size % share == 0 and members % (size // share) == 0:
        if not isinstance(replicas, NamedAxis) or size == share * members:
            return slices
        indices = np.arange(members).reshape(-1, size // share)
        groups = tuple(tuple(map(int, group)) for group in indices)
        return replace(slices, replicas=grouped(replicas, groups))
    total = share * members
    fits = [n for n in range(1, total + 1) if total % n == 0 and (share % n == 0 or n % share == 0)]
    shown = ", ".join(map(str, fits[:20])) + (", ..." if len(fits) > 20 else "")
    raise ValueError(
        f"{operation}: virtual_batch_size must divide the {total} examples of the batch into equal "
        f"parts, each of whole shares or part of one; got virtual_batch_size={size} for "
        f"x.shape={shape} on each of {members} replicas. Choose one of {shown}."
    )
