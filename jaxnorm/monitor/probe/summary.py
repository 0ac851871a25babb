"""The numbers that describe an array, whatever its size.

A `Summary` is a monoid like the `Moments` in it. Parts of a batch, devices of a mesh and iterations
of a loop each have a summary, and these merge into the summary of the whole.
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

BINS = 64
# Bins are as wide as their place is far from zero, and evenly wide near it. So they can be the same
# for all layers, steps and runs: what an activation is at the start says little of the end.
NEAR, _FAR = 1 / 32, 512.0
BINS_PER_UNIT = (BINS - 2) / 2 / math.asinh(_FAR / NEAR)
EDGES = (np.sinh((np.arange(BINS - 1) - (BINS - 2) / 2) / BINS_PER_UNIT) * NEAR).astype(np.float32)
"""The 63 edges between the bins; the first and the last bin have no end."""

FLAT = 0.05
"""A nonlinearity is flat where its derivative is below this share of its largest."""
# sigmoid' = y (1 - y) and tanh' = 1 - y^2, in terms of their own values.
_SIGMOID = (1 - math.sqrt(1 - FLAT)) / 2
_TANH = math.sqrt(1 - FLAT)
# The values up to which, and from which on, it is flat.
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

    All numbers are float32, or float64 for float64 arrays. The shapes below are those of one
    array. A leading axis goes over layers, channels, samples, or parts of a batch.

    Attributes:
        size: elements of the array. `moments.count` of them were sampled.
        moments: count, mean and summed squared deviation of the sampled elements.
        minimum: the smallest of them.
        maximum: the largest of them.
        nonfinite: share of elements that are infinite or not a number.
        zeros: share of elements that are exactly zero. None, as all that follows, for gradients.
        saturated: share of elements where the nonlinearity is flat: its derivative is below 5 % of
            its largest.
        dead: share of channels that are flat everywhere. None, as the histogram, for a single
            channel.
        histogram: numbers counted between `EDGES`, for a part of the sampled elements.
    """

    size: Float[Array, ""]  # float32, shape ()
    moments: Moments  # float32, shape () each
    minimum: Float[Array, ""]  # float32, shape ()
    maximum: Float[Array, ""]  # float32, shape ()
    nonfinite: Float[Array, ""]  # float32, shape ()
    zeros: Float[Array, ""] | None = None  # float32, shape ()
    saturated: Float[Array, ""] | None = None  # float32, shape ()
    dead: Float[Array, ""] | None = None  # float32, shape (); (c,) until `completed`
    histogram: Float[Array, " bins"] | None = None  # float32, shape (64,)

    @property
    def norm(self) -> Float[Array, ""]:
        """Euclidean norm of the whole array, estimated from the sampled elements."""
        return jnp.sqrt(self.size * (lax.square(self.moments.mean) + self.moments.var))

    def take(self, entries: Sequence[int] | np.ndarray, axis: int = 0) -> Summary:
        """Select entries along an axis."""
        entries = list(map(int, entries))
        if entries == list(range(self.size.shape[axis])):
            return self
        return jax.tree.map(lambda a: jnp.take(a, np.asarray(entries, int), axis), self)

    def pooled(self) -> Summary:
        """The summary of everything that the leading axis goes over.

        Shares are means over the sampled elements. A channel is dead only where it is dead in all
        parts; the smallest share of the parts is an upper bound of that.
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

    def completed(self) -> Summary:
        """The summary of a whole array, from a leading axis of parts of the batch."""
        summary = _pool_parts(self)
        return summary if summary.dead is None else summary._replace(dead=summary.dead.mean(-1))


class BatchSummary(NamedTuple):
    """Moments of a batch norm's input, by channel, beside its running statistics.

    All numbers are float32, or float64 for float64 arrays. The probe keeps `example_means` and
    `positions` while it pools the parts of a batch, and replaces them by `independent` at the end.

    Attributes:
        moments: moments of each channel of the batch.
        running_mean: running mean before the batch.
        running_var: running variance before the batch.
        examples: number of examples of the batch.
        independent: how many independent numbers would tell as much about a channel's mean: at
            most its elements, fewer where the positions of an image resemble each other.
        example_means: moments of the means of single examples; None in a whole batch.
        positions: number of positions of an example; None in a whole batch.
    """

    moments: Moments  # float32, shape (c,) each
    running_mean: Float[Array, " c"]  # float32, shape (c,)
    running_var: Float[Array, " c"]  # float32, shape (c,)
    examples: Float[Array, ""]  # float32, shape ()
    independent: Float[Array, ""] | None = None  # float32, shape ()
    example_means: Moments | None = None  # float32, shape (c,) each
    positions: Float[Array, ""] | None = None  # float32, shape ()

    def pooled(self) -> BatchSummary:
        """Pool batches over the leading axis; running statistics are those before the first."""
        return BatchSummary(
            self.moments.pooled(),
            self.running_mean[0],
            self.running_var[0],
            self.examples.sum(0),
            None if self.independent is None else self.independent.sum(0),
            None if self.example_means is None else self.example_means.pooled(),
            None if self.positions is None else self.positions.max(0),
        )

    def completed(self) -> BatchSummary:
        r"""The summary of a whole batch, from a leading axis of parts of the batch.

        The independent numbers are estimated as

        .. math::
            n_{ind} = \frac{n s}{1 + (s - 1) \rho}, \quad
            \rho = \frac{B - W}{B + (s - 1) W}

        for n examples of s positions, with B and W the mean squares between and within examples:
        the number of examples where the positions of each are all alike, that of all positions
        where each is drawn anew (the design effect and the intraclass correlation of one-way
        analysis of variance; Kish, Survey Sampling, 1965, section 5.4).
        """
        whole = _pool_parts(self)
        if whole.example_means is None or whole.positions is None:
            return whole
        n = whole.example_means.count[..., 0]
        s = whole.moments.count[..., 0] / jnp.maximum(n, 1)
        between = s * whole.example_means.m2.sum(-1)
        within = jnp.maximum(whole.moments.m2.sum(-1) - between, 0)
        b, w = between / jnp.maximum(n - 1, 1), within / jnp.maximum(n * (s - 1), 1)
        total = b + (s - 1) * w
        rho = jnp.where(total > 0, (b - w) / jnp.where(total > 0, total, 1), 0)
        # An estimate, which chance may bring out of the range of what is possible.
        alike = jnp.where((n > 1) & (s > 1), jnp.clip(rho, 0, 1), 1)
        independent = whole.examples * whole.positions / (1 + (whole.positions - 1) * alike)
        return whole._replace(independent=independent, example_means=None, positions=None)


def _pool_parts(summary):
    """Pool parts of a batch; a single part is the whole."""
    parts = jax.tree.leaves(summary)[0].shape[0]
    return summary.pooled() if parts > 1 else jax.tree.map(lambda a: a[0], summary)
