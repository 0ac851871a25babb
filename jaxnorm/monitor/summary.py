"""What is kept of an array that somebody looks at: a few numbers, whatever its size.

A `Summary` is a monoid like the `Moments` in it: the parts of a batch, the devices of a mesh, the
iterations of a loop each have one, and together they have that of the whole.

Arrays are looked at together, those of one shape in one go: on small networks it is the number of
operations that costs, not that of elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxnorm.core.moments import Moments, wide_dtype

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
    """An array in a few numbers.

    Shapes are those of one layer; a scan over layers puts an axis before them.
    """

    size: Float[Array, ""]
    """Elements of the array. `moments.count` of them were looked at."""
    moments: Moments
    minimum: Float[Array, ""]
    maximum: Float[Array, ""]
    nonfinite: Float[Array, ""]
    """Share of elements that are infinite or not a number."""
    zeros: Float[Array, ""] | None = None
    """Share of elements that are exactly zero. None, as all that follows, for gradients."""
    saturated: Float[Array, ""] | None = None
    """Share of elements where the nonlinearity is flat; see `FLAT`."""
    dead: Float[Array, ""] | None = None
    """Share of channels that are flat everywhere."""
    histogram: Float[Array, " bins"] | None = None
    """Numbers counted between `EDGES`, of a part of those that were looked at."""

    @property
    def norm(self) -> Float[Array, ""]:
        """Euclidean norm of the whole array, as far as what was looked at tells."""
        return jnp.sqrt(self.size * (lax.square(self.moments.mean) + self.moments.var))

    def take(self, places: Sequence[int] | np.ndarray) -> Summary:
        """Some of a row of summaries."""
        places = list(map(int, places))
        if places == list(range(len(self.size))):
            return self
        return jax.tree.map(lambda a: a[np.asarray(places, int)], self)

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


class BatchSummary(NamedTuple):
    """What a batch norm was given, by channel, beside its running statistics."""

    moments: Moments
    running_mean: Float[Array, " c"]
    running_var: Float[Array, " c"]
    examples: Float[Array, ""]
    """Examples of the batch."""
    independent: Float[Array, ""]
    """How many independent numbers would tell as much about a channel's mean."""

    def pooled(self) -> BatchSummary:
        """Of all batches that the leading axis goes over; running statistics before the first."""
        return BatchSummary(
            self.moments.pooled(),
            self.running_mean[0],
            self.running_var[0],
            self.examples.sum(0),
            self.independent.sum(0),
        )


@dataclass(frozen=True)
class Excerpt:
    """What is looked at of an array."""

    rows: Float[Array, "n s c"]
    """Some of its examples, some of their positions, some of their channels."""
    shape: tuple[int, int, int]
    """Examples, positions and channels of the whole array."""
    kind: str = ""
    """The nonlinearity whose value it is, if it is one's."""


def excerpt(
    x: Float[Array, "*shape"],
    elements: int | None,
    kind: str = "",
    feature_axes: tuple[int, ...] | None = None,
) -> Excerpt:
    """About so many elements of `x`, evenly spread.

    Args:
        x: examples first; channels last.
        elements: None for all.
        kind: see `Excerpt`.
        feature_axes: other axes of the channels, all of which are looked at.
    """
    x = x if x.ndim else x.reshape(1)
    axes = [a % x.ndim for a in feature_axes or (-1,)]
    first = x.ndim - len(axes)
    if axes != list(range(first, x.ndim)):
        x = jnp.moveaxis(x, axes, range(first, x.ndim))
    n = x.shape[0] if first else 1
    s, c = math.prod(x.shape[1:first]), math.prod(x.shape[first:])
    if elements is None or x.size <= elements:
        rows = x.reshape(n, s, c)
    else:
        wanted = max(1, elements // c)  # rows of channels
        # The examples in equal parts, as they lie on devices: each takes of what it has.
        parts = math.gcd(n, max(_PARTS, 2 ** (jax.device_count() - 1).bit_length()))
        each = n // parts
        step = max(1, each // max(1, wanted // (parts * min(s, _POSITIONS))))
        x = _every(x.reshape(parts, each, *x.shape[1:]), 1, step)
        n_kept = parts * x.shape[1]
        rows = _every(x.reshape(n_kept, s, c), 1, _stride(s, max(1, wanted // n_kept)))
        if not feature_axes:
            rows = _every(rows, 2, max(1, rows.size // elements))
    return Excerpt(rows.astype(wide_dtype(x.dtype)), (n, s, c), kind)


_PARTS, _POSITIONS, _LARGE = 32, 16, 2**20


def _stride(size: int, wanted: int) -> int:
    """Of about so many positions: odd, so that they do not all lie in a few columns of an image."""
    step = max(1, size // wanted)
    return step if step % 2 or step == 1 else step - 1


def _every(x: Array, axis: int, step: int) -> Array:
    """One of each so many entries along an axis, from the middle of each run of them."""
    count = x.shape[axis] // step
    if step == 1:
        return x
    if x.size < _LARGE:
        return lax.slice_in_dim(x, step // 2, count * step, step, axis)
    # A compiler for TPUs has no room for all that a strided slice steps over.
    runs = lax.slice_in_dim(x, 0, count * step, axis=axis)
    runs = runs.reshape(*x.shape[:axis], count, step, *x.shape[axis + 1 :])
    return lax.index_in_dim(runs, step // 2, axis + 1, keepdims=False)


def summarize(excerpts: Sequence[Excerpt], *, values: bool = True) -> Summary:
    """Summaries of arrays.

    Args:
        excerpts: of what is looked at.
        values: whether they are values, rather than gradients.

    Returns:
        A `Summary` with an axis of excerpts, float32 at least.
    """
    parts, order = [], []
    for places, together in _alike(excerpts):
        order += places
        rows = together.reshape(len(places), -1, together.shape[-1])
        columns = Moments(*(a.T for a in _moments(rows)))
        summary = Summary(
            jnp.asarray([float(math.prod(excerpts[i].shape)) for i in places], rows.dtype),
            columns.pooled(),
            rows.min((1, 2)),
            rows.max((1, 2)),
            _share(~jnp.isfinite(rows)),
        )
        if values:
            ends = [FLAT_ENDS.get(excerpts[i].kind, (-math.inf, math.inf)) for i in places]
            low, high = jnp.asarray(ends, rows.dtype).T[..., None, None]
            flat = (rows <= low) | (rows >= high)
            summary = summary._replace(
                zeros=_share(rows == 0),
                saturated=_share(flat),
                dead=flat.all(1).astype(rows.dtype).mean(-1),
                histogram=_histograms(rows),
            )
        parts.append(summary)
    return joined(parts).take(np.argsort(order))


def joined(parts: Sequence[Summary]) -> Summary:
    """Those of several rows of summaries, in one row."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def summarize_batches(
    excerpts: Sequence[Excerpt], running: Sequence[tuple[Array, Array]]
) -> list[BatchSummary]:
    r"""Summaries of batch norms' inputs.

    .. math::
        n_{ind} = \frac{n s}{1 + (s - 1) \rho}, \quad
        \rho = \frac{B - W}{B + (s - 1) W}

    for n examples of s positions, with B and W the mean squares between and within examples: the
    number of examples where the positions of each are all alike, that of all positions where each
    is drawn anew (the design effect and the intraclass correlation of one-way analysis of variance;
    Kish, Survey Sampling, 1965, section 5.4).

    Args:
        excerpts: with all channels.
        running: mean and variance, before the batch.

    Returns:
        A `BatchSummary` each.
    """
    found: dict[int, BatchSummary] = {}
    for places, together in _alike(excerpts):
        count, n, s, c = together.shape
        moments = _moments(together.reshape(count, n * s, c))
        between = s * _moments(together.mean(2)).m2.sum(-1)
        within = jnp.maximum(moments.m2.sum(-1) - between, 0)
        b, w = between / max(n - 1, 1), within / max(n * (s - 1), 1)
        total = b + (s - 1) * w
        rho = jnp.where(total > 0, (b - w) / jnp.where(total > 0, total, 1), 0)
        for i, place in enumerate(places):
            examples, positions, _ = excerpts[place].shape
            # An estimate, which chance may bring out of the range of what is possible.
            alike = jnp.clip(rho[i], 0, 1) if n > 1 and s > 1 else jnp.ones_like(rho[i])
            wide = together.dtype
            mean, var = running[place]
            found[place] = BatchSummary(
                jax.tree.map(lambda a, i=i: a[i], moments),
                mean.reshape(c).astype(wide),
                var.reshape(c).astype(wide),
                jnp.asarray(examples, wide),
                examples * positions / (1 + (positions - 1) * alike),
            )
    return [found[i] for i in range(len(excerpts))]


def by_channel(excerpts: Sequence[Excerpt]) -> list[Moments]:
    """Moments of each channel.

    Args:
        excerpts: with all channels.
    """
    found: dict[int, Moments] = {}
    for places, together in _alike(excerpts):
        moments = _moments(together.reshape(len(places), -1, together.shape[-1]))
        for i, place in enumerate(places):
            found[place] = jax.tree.map(lambda a, i=i: a[i], moments)
    return [found[i] for i in range(len(excerpts))]


def _alike(excerpts: Sequence[Excerpt]) -> list[tuple[list[int], Array]]:
    """Those of one shape and dtype together, and where they were."""
    groups: dict[Any, list[int]] = {}
    for i, each in enumerate(excerpts):
        groups.setdefault((each.rows.shape, each.rows.dtype), []).append(i)
    return [(places, jnp.stack([excerpts[i].rows for i in places])) for places in groups.values()]


def _moments(rows: Float[Array, "k n c"]) -> Moments:
    """Of each column: squares are taken of what is left when a value near it is subtracted."""
    n = rows.shape[1]
    origin = _every(rows, 1, max(1, n // 8)).mean(1)
    shifted = rows - origin[:, None]
    mean = shifted.sum(1) / n
    m2 = jnp.maximum(lax.square(shifted).sum(1) - n * lax.square(mean), 0)
    return Moments(jnp.full_like(mean, n), origin + mean, m2)


def _share(condition: Array) -> Array:
    return condition.astype(jnp.float32).mean((1, 2))


def _histograms(rows: Float[Array, "k n c"]) -> Float[Array, "k bins"]:
    _, n, c = rows.shape
    values = _every(rows, 1, _stride(n, max(1, _COUNTED // c)))
    values = _every(values, 2, max(1, c // _COUNTED))
    values = values.reshape(len(rows), -1)
    finite = values == values
    # Of what is not a number the bin does not matter: it counts nothing.
    at = jnp.arcsinh(jnp.where(finite, values, 0) / _NEAR) * _PER_UNIT + BINS / 2
    bins = jnp.clip(jnp.floor(at), 0, BINS - 1).astype(jnp.int32)

    def scattered(bins, weights):
        counts = jnp.zeros((len(bins), BINS), weights.dtype)
        return counts.at[jnp.arange(len(bins))[:, None], bins].add(weights)

    def compared(bins, weights):
        return jnp.where(bins[..., None] == jnp.arange(BINS), weights[..., None], 0).sum(1)

    # TPUs write one number after the other.
    return lax.platform_dependent(bins, finite.astype(rows.dtype), tpu=compared, default=scattered)
