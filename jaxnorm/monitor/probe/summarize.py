"""Summaries of subsamples, computed in the traced program.

Arrays of one shape are summarized together: on small networks the number of operations costs time,
not the number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxnorm.core.moments import Moments
from jaxnorm.monitor.probe.subsample import Subsample, every_nth, odd_stride, stack_alike
from jaxnorm.monitor.probe.summary import (
    BINS,
    BINS_PER_UNIT,
    FLAT_ENDS,
    NEAR,
    BatchSummary,
    Summary,
)

_COUNTED = 1024  # numbers that are counted into bins, at most


def summarize(
    subsamples: Sequence[Subsample], *, values: bool = True
) -> list[tuple[list[int], Summary]]:
    """Summarize arrays, those of one shape together.

    Args:
        subsamples: one for each array.
        values: True for values, False for gradients.

    Returns:
        For each shape the positions of its arrays in `subsamples`, and their `Summary` of shape
        (parts, arrays), whose `dead` has shape (parts, arrays, c).
    """
    groups = []
    for members, stacked in stack_alike(subsamples):
        parts, count, n, s, c = stacked.shape
        rows = stacked.reshape(parts, count, n * s, c)
        size = jnp.asarray([math.prod(subsamples[i].shape) / parts for i in members], rows.dtype)
        flat = _flat(rows, [subsamples[i].kind for i in members]) if values else None
        columns = Moments(*(jnp.moveaxis(a, -1, 0) for a in _moments(rows)))
        summary = _described(rows, size, columns.pooled(), flat, (2, 3))
        if flat is not None:
            dead = flat.all(2).astype(rows.dtype)
            summary = summary._replace(dead=dead, histogram=_histograms(rows))
        groups.append((members, summary))
    return groups


def summarize_channels(subsamples: Sequence[Subsample], *, values: bool = True) -> list[Summary]:
    """Summarize each channel of arrays.

    Args:
        subsamples: one for each array, with all channels.
        values: as in `summarize`.

    Returns:
        For each array a `Summary` of shape (parts, c), without `dead` and `histogram`.
    """
    found: dict[int, Summary] = {}
    for members, stacked in stack_alike(subsamples):
        parts, count, n, s, c = stacked.shape
        rows = stacked.reshape(parts, count, n * s, c)
        size = [math.prod(subsamples[i].shape[:2]) / parts for i in members]
        flat = _flat(rows, [subsamples[i].kind for i in members]) if values else None
        sizes = jnp.broadcast_to(jnp.asarray(size, rows.dtype)[:, None], (count, c))
        summary = _described(rows, sizes, _moments(rows), flat, (2,))
        for i, at in enumerate(members):
            found[at] = jax.tree.map(lambda a, i=i: a[:, i], summary)
    return [found[i] for i in range(len(subsamples))]


def _described(
    rows: Float[Array, "parts k n c"],
    size: Array,
    moments: Moments,
    flat: Array | None,
    axes: tuple[int, ...],
) -> Summary:
    """Summarize numbers along some axes; `flat` is None for gradients."""

    def share(condition: Array) -> Array:
        return condition.astype(jnp.float32).mean(axes)

    summary = Summary(
        jnp.broadcast_to(size, (rows.shape[0], *size.shape)),
        moments,
        rows.min(axes),
        rows.max(axes),
        share(~jnp.isfinite(rows)),
    )
    if flat is None:
        return summary
    return summary._replace(zeros=share(rows == 0), saturated=share(flat))


def _flat(rows: Float[Array, "parts k n c"], kinds: Sequence[str]) -> Array:
    """A mask of the numbers that lie where the nonlinearity which gave them is flat."""
    ends = [FLAT_ENDS.get(kind, (-math.inf, math.inf)) for kind in kinds]
    low, high = jnp.asarray(ends, rows.dtype).T[..., None, None]
    return (rows <= low) | (rows >= high)


def summarize_batches(
    subsamples: Sequence[Subsample], running: Sequence[tuple[Array, Array]]
) -> list[BatchSummary]:
    """Summarize the inputs of batch norms.

    Args:
        subsamples: one for each input, with all channels.
        running: running mean and variance of each norm, before the batch.

    Returns:
        For each input a `BatchSummary` with a leading axis of parts of the batch.
    """
    found: dict[int, BatchSummary] = {}
    for members, stacked in stack_alike(subsamples):
        parts, count, n, s, c = stacked.shape
        moments = _moments(stacked.reshape(parts, count, n * s, c))
        example_means = _moments(stacked.mean(3))
        for i, at in enumerate(members):
            examples, positions, _ = subsamples[at].shape
            mean, var = (
                jnp.broadcast_to(a.reshape(c).astype(stacked.dtype), (parts, c))
                for a in running[at]
            )
            found[at] = BatchSummary(
                jax.tree.map(lambda a, i=i: a[:, i], moments),
                mean,
                var,
                jnp.full(parts, examples / parts, stacked.dtype),
                example_means=jax.tree.map(lambda a, i=i: a[:, i], example_means),
                positions=jnp.full(parts, positions, stacked.dtype),
            )
    return [found[i] for i in range(len(subsamples))]


def _moments(rows: Float[Array, "parts k n c"]) -> Moments:
    """The moments of each column, computed from its differences to a value near it."""
    n = rows.shape[2]
    origin = every_nth(rows, 2, max(1, n // 8)).mean(2)
    shifted = rows - origin[:, :, None]
    mean = shifted.sum(2) / n
    m2 = jnp.maximum(lax.square(shifted).sum(2) - n * lax.square(mean), 0)
    return Moments(jnp.full_like(mean, n), origin + mean, m2)


def _histograms(rows: Float[Array, "parts k n c"]) -> Float[Array, "parts k bins"]:
    """Counts of some of the numbers in each bin."""
    parts, count, n, c = rows.shape
    counted = max(1, _COUNTED // parts)
    values = every_nth(rows, 2, odd_stride(n, max(1, counted // c)))
    values = every_nth(values, 3, max(1, c // counted))
    values = values.reshape(parts, count, -1)
    finite = values == values
    # The bin of what is not a number does not matter: its weight is 0.
    at = jnp.arcsinh(jnp.where(finite, values, 0) / NEAR) * BINS_PER_UNIT + BINS / 2
    bins = jnp.clip(jnp.floor(at), 0, BINS - 1).astype(jnp.int32)

    def scattered(bins, weights):
        def one(bins, weights):
            return jnp.zeros(BINS, weights.dtype).at[bins].add(weights)

        return jax.vmap(jax.vmap(one))(bins, weights)

    def compared(bins, weights):
        return jnp.where(bins[..., None] == jnp.arange(BINS), weights[..., None], 0).sum(2)

    # TPUs write one number after the other.
    return lax.platform_dependent(bins, finite.astype(rows.dtype), tpu=compared, default=scattered)
