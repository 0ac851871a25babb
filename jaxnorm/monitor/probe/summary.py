"""Summaries of an array: a few numbers, whatever its size.

A `Summary` is a monoid like the `Moments` in it: the parts of a batch, the devices of a mesh, the
iterations of a loop each have one, and together they have that of the whole.

Arrays are looked at together, those of one shape in one go: on small networks it is the number of
operations that costs, not that of elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxnorm.core.moments import Moments
from jaxnorm.monitor.probe.subsample import Excerpt, alike, every_nth, odd_stride

BINS = 64
# Bins are as wide as their place is far from zero, and evenly wide near it. So they can be the same
# for all layers, steps and runs: what an activation is at the start says little of the end.
_NEAR, _FAR = 1 / 32, 512.0
_PER_UNIT = (BINS - 2) / 2 / math.asinh(_FAR / _NEAR)
EDGES = (np.sinh((np.arange(BINS - 1) - (BINS - 2) / 2) / _PER_UNIT) * _NEAR).astype(np.float32)
"""The 63 edges between the bins; the first and the last bin have no end."""
_COUNTED = 1024  # numbers that are counted into bins, at most

FLAT = 0.05
"""A nonlinearity is flat where its derivative is below this share of its largest."""
# sigmoid' = y (1 - y) and tanh' = 1 - y^2, in terms of their own values.
_SIGMOID = (1 - math.sqrt(1 - FLAT)) / 2
_TANH = math.sqrt(1 - FLAT)
# Up to and from which of its values it is flat.
FLAT_ENDS = {
    "relu": (0.0, math.inf),
    "relu6": (0.0, 6.0),
    "sigmoid": (_SIGMOID, 1 - _SIGMOID),
    "hard_sigmoid": (0.0, 1.0),
    "tanh": (-_TANH, _TANH),
    "hard_tanh": (-1.0, 1.0),
}


class Summary(NamedTuple):
    """An array in a few numbers, which merge like its `Moments`.

    Shapes are those of one layer; a scan over layers puts an axis before them. Of channels, each
    number has an axis of these.

    Attributes:
        size: elements of the array. `moments.count` of them were looked at.
        moments: count, mean and summed squared deviation of these.
        minimum: the smallest of them.
        maximum: the largest of them.
        nonfinite: share of elements that are infinite or not a number.
        zeros: share of elements that are exactly zero. None, as all that follows, for gradients.
        saturated: share of elements where the nonlinearity is flat: its derivative is below 5 % of
            its largest.
        dead: share of channels that are flat everywhere. None, as the histogram, of channels
            alone.
        histogram: numbers counted between `EDGES`, shape (64,), of a part of those that were
            looked at.
    """

    size: Float[Array, ""]
    moments: Moments
    minimum: Float[Array, ""]
    maximum: Float[Array, ""]
    nonfinite: Float[Array, ""]
    zeros: Float[Array, ""] | None = None
    saturated: Float[Array, ""] | None = None
    dead: Float[Array, ""] | None = None
    histogram: Float[Array, " bins"] | None = None

    @property
    def norm(self) -> Float[Array, ""]:
        """Euclidean norm of the whole array, as far as what was looked at tells."""
        return jnp.sqrt(self.size * (lax.square(self.moments.mean) + self.moments.var))

    def take(self, places: Sequence[int] | np.ndarray, axis: int = 0) -> Summary:
        """Some of a row of summaries, which that axis goes over."""
        places = list(map(int, places))
        if places == list(range(self.size.shape[axis])):
            return self
        return jax.tree.map(lambda a: jnp.take(a, np.asarray(places, int), axis), self)

    def pooled(self) -> Summary:
        """The summary of all that the leading axis goes over.

        Shares are means over what was looked at. A channel is dead only where it is so in all
        parts, of which the least share is a bound from above.
        """
        weight = self.moments.count / jnp.maximum(self.moments.count.sum(0), 1)

        return Summary(
            self.size.sum(0),
            self.moments.pooled(),
            self.minimum.min(0),
            self.maximum.max(0),
            (weight * self.nonfinite).sum(0),
            None if self.zeros is None else (weight * self.zeros).sum(0),
            None if self.saturated is None else (weight * self.saturated).sum(0),
            None if self.dead is None else self.dead.min(0),
            None if self.histogram is None else self.histogram.sum(0),
        )


Group = tuple[list[int], Summary]


class BatchSummary(NamedTuple):
    """Moments of a batch norm's input, by channel, beside its running statistics.

    Attributes:
        moments: of each channel of the batch, shape (c,).
        running_mean: running mean, shape (c,).
        running_var: running variance, shape (c,).
        examples: examples of the batch, shape ().
        independent: how many independent numbers would tell as much about a channel's mean: at
            most its elements, fewer where the positions of an image resemble each other.
    """

    moments: Moments
    running_mean: Float[Array, " c"]
    running_var: Float[Array, " c"]
    examples: Float[Array, ""]
    independent: Float[Array, ""]

    def pooled(self) -> BatchSummary:
        """Batches pooled over the leading axis; running statistics before the first."""
        return BatchSummary(
            self.moments.pooled(),
            self.running_mean[0],
            self.running_var[0],
            self.examples.sum(0),
            self.independent.sum(0),
        )


def summarize(excerpts: Sequence[Excerpt], *, values: bool = True) -> list[Group]:
    """Summaries of arrays, of each part of the batch.

    Args:
        excerpts: of what is looked at.
        values: whether they are values, rather than gradients.

    Returns:
        Those of one shape together: a `Summary`, float32 at least, with an axis of parts and one
        of excerpts, and of which excerpts it is. `dead` tells of each channel whether it is flat.
    """
    groups = []
    for places, together in alike(excerpts):
        parts, count, n, s, c = together.shape
        rows = together.reshape(parts, count, n * s, c)
        size = jnp.asarray([math.prod(excerpts[i].shape) / parts for i in places], rows.dtype)
        flat = _flat(rows, [excerpts[i].kind for i in places]) if values else None
        columns = Moments(*(jnp.moveaxis(a, -1, 0) for a in _moments(rows)))
        summary = _described(rows, size, columns.pooled(), flat, (2, 3))
        if flat is not None:
            dead = flat.all(2).astype(rows.dtype)
            summary = summary._replace(dead=dead, histogram=_histograms(rows))
        groups.append((places, summary))
    return groups


def by_channel(excerpts: Sequence[Excerpt], *, values: bool = True) -> list[Summary]:
    """Summaries of each channel, with an axis of parts of the batch before that of channels.

    Args:
        excerpts: with all channels.
        values: as for `summarize`.

    Returns:
        `Summary`, without what is told of all channels together and without histograms.
    """
    found: dict[int, Summary] = {}
    for places, together in alike(excerpts):
        parts, count, n, s, c = together.shape
        rows = together.reshape(parts, count, n * s, c)
        size = [math.prod(excerpts[i].shape[:2]) / parts for i in places]
        flat = _flat(rows, [excerpts[i].kind for i in places]) if values else None
        sizes = jnp.broadcast_to(jnp.asarray(size, rows.dtype)[:, None], (count, c))
        summary = _described(rows, sizes, _moments(rows), flat, (2,))
        for i, place in enumerate(places):
            found[place] = jax.tree.map(lambda a, i=i: a[:, i], summary)
    return [found[i] for i in range(len(excerpts))]


def _described(
    rows: Float[Array, "parts k n c"],
    size: Array,
    moments: Moments,
    flat: Array | None,
    axes: tuple[int, ...],
) -> Summary:
    """The summary of numbers along some axes; `flat` is None for gradients."""

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


def finished(summary: Summary) -> Summary:
    """The summary of all parts, with the share of dead channels."""
    return summary if summary.dead is None else summary._replace(dead=summary.dead.mean(-1))


def joined(parts: Sequence[Summary]) -> Summary:
    """Those of several rows of summaries, in one row."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


class BatchParts(NamedTuple):
    """The input of a batch norm, in numbers that are pooled over parts of the batch."""

    moments: Moments
    of_examples: Moments
    """Of the means of examples."""
    running_mean: Float[Array, " c"]
    running_var: Float[Array, " c"]
    examples: Float[Array, ""]
    """Of the part; of some of them are the moments."""
    positions: Float[Array, ""]
    """Of each example."""

    def pooled(self) -> BatchParts:
        """Parts pooled over the leading axis; running statistics before the first."""
        return BatchParts(
            self.moments.pooled(),
            self.of_examples.pooled(),
            self.running_mean[0],
            self.running_var[0],
            self.examples.sum(0),
            self.positions.max(0),
        )

    def summary(self) -> BatchSummary:
        r"""The summary of a batch, with an estimate of how many numbers are independent.

        .. math::
            n_{ind} = \frac{n s}{1 + (s - 1) \rho}, \quad
            \rho = \frac{B - W}{B + (s - 1) W}

        for n examples of s positions, with B and W the mean squares between and within examples:
        the number of examples where the positions of each are all alike, that of all positions
        where each is drawn anew (the design effect and the intraclass correlation of one-way
        analysis of variance; Kish, Survey Sampling, 1965, section 5.4).
        """
        n = self.of_examples.count[..., 0]
        s = self.moments.count[..., 0] / jnp.maximum(n, 1)
        between = s * self.of_examples.m2.sum(-1)
        within = jnp.maximum(self.moments.m2.sum(-1) - between, 0)
        b, w = between / jnp.maximum(n - 1, 1), within / jnp.maximum(n * (s - 1), 1)
        total = b + (s - 1) * w
        rho = jnp.where(total > 0, (b - w) / jnp.where(total > 0, total, 1), 0)
        # An estimate, which chance may bring out of the range of what is possible.
        alike = jnp.where((n > 1) & (s > 1), jnp.clip(rho, 0, 1), 1)
        independent = self.examples * self.positions / (1 + (self.positions - 1) * alike)
        return BatchSummary(
            self.moments, self.running_mean, self.running_var, self.examples, independent
        )


def summarize_batches(
    excerpts: Sequence[Excerpt], running: Sequence[tuple[Array, Array]]
) -> list[BatchParts]:
    """Summarize the inputs of batch norms, with an axis of parts of the batch.

    Args:
        excerpts: with all channels.
        running: mean and variance, before the batch.
    """
    found: dict[int, BatchParts] = {}
    for places, together in alike(excerpts):
        parts, count, n, s, c = together.shape
        moments = _moments(together.reshape(parts, count, n * s, c))
        of_examples = _moments(together.mean(3))
        for i, place in enumerate(places):
            examples, positions, _ = excerpts[place].shape
            mean, var = (
                jnp.broadcast_to(a.reshape(c).astype(together.dtype), (parts, c))
                for a in running[place]
            )
            found[place] = BatchParts(
                jax.tree.map(lambda a, i=i: a[:, i], moments),
                jax.tree.map(lambda a, i=i: a[:, i], of_examples),
                mean,
                var,
                jnp.full(parts, examples / parts, together.dtype),
                jnp.full(parts, positions, together.dtype),
            )
    return [found[i] for i in range(len(excerpts))]


def _moments(rows: Float[Array, "parts k n c"]) -> Moments:
    """The moments of each column, taken of its differences from a value near it."""
    n = rows.shape[2]
    origin = every_nth(rows, 2, max(1, n // 8)).mean(2)
    shifted = rows - origin[:, :, None]
    mean = shifted.sum(2) / n
    m2 = jnp.maximum(lax.square(shifted).sum(2) - n * lax.square(mean), 0)
    return Moments(jnp.full_like(mean, n), origin + mean, m2)


def _histograms(rows: Float[Array, "parts k n c"]) -> Float[Array, "parts k bins"]:
    parts, count, n, c = rows.shape
    counted = max(1, _COUNTED // parts)
    values = every_nth(rows, 2, odd_stride(n, max(1, counted // c)))
    values = every_nth(values, 3, max(1, c // counted))
    values = values.reshape(parts, count, -1)
    finite = values == values
    # Of what is not a number the bin does not matter: it counts nothing.
    at = jnp.arcsinh(jnp.where(finite, values, 0) / _NEAR) * _PER_UNIT + BINS / 2
    bins = jnp.clip(jnp.floor(at), 0, BINS - 1).astype(jnp.int32)

    def scattered(bins, weights):
        def one(bins, weights):
            return jnp.zeros(BINS, weights.dtype).at[bins].add(weights)

        return jax.vmap(jax.vmap(one))(bins, weights)

    def compared(bins, weights):
        return jnp.where(bins[..., None] == jnp.arange(BINS), weights[..., None], 0).sum(2)

    # TPUs write one number after the other.
    return lax.platform_dependent(bins, finite.astype(rows.dtype), tpu=compared, default=scattered)
