"""Measures of a recording: one number for each place and sample, for rules and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.core.moments import Moments
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.observations import Observation
from jaxnorm.monitor.probe.summary import EDGES, FLAT_ENDS, BatchSummary, Summary
from jaxnorm.monitor.samples.recording import Recording
from jaxnorm.monitor.samples.shift import (
    excess_kurtosis,
    kl_divergence,
    mean_drift,
    population_stability_index,
    skewness,
    variance_ratio,
)

MEASURES = {
    "spread": "standard deviation of a channel over examples and positions, mean over channels",
    "mean": "mean of all elements",
    "deviation": "standard deviation of all elements",
    "mean_drift": "distance of the mean from that of the sample before",
    "variance_ratio": "variance over that of the sample before",
    "kl_divergence": "Kullback-Leibler divergence from the sample before, of normal distributions "
    "of these means and variances, in nats",
    "histogram_kl": "Kullback-Leibler divergence from the sample before, of the histograms, in "
    "nats",
    "population_stability_index": "population stability index against the sample before, in nats",
    "skewness": "third standardized moment of the histogram; 0 for a normal distribution",
    "excess_kurtosis": "fourth standardized moment of the histogram less 3; 0 for a normal "
    "distribution",
    "minimum": "smallest element",
    "maximum": "largest element",
    "zeros": "share of elements that are exactly zero",
    "saturated": "share of elements where the nonlinearity is flat",
    "dead": "share of channels that are flat for every example",
    "nonfinite": "share of elements that are infinite or not a number",
    "gradient_norm": "Euclidean norm of the loss's gradient here",
    "running_kl": "Kullback-Leibler divergence of the batch's channels from the running "
    "statistics, mean over channels, in nats",
    "effective_batch": "independent numbers that the statistics of a channel come from",
    "near_epsilon": "share of channels whose variance is below ten times epsilon",
}
"""Name of each measure that `measure` takes -> what it is."""

NEAR_EPSILON = 10.0
"""At this many times epsilon a normalized channel's deviation is 5 % short of one."""

Series = dict[str, np.ndarray]
"""Name of a place -> one number for each sample, float64 of shape (samples,)."""


def measure(recording: Recording) -> dict[str, Series]:
    """Every measure of every place of a recording, by sample.

    Args:
        recording: the recording of one run.

    Returns:
        Name of a measure -> name of a place -> float64 of shape (samples,). There are those of
        `MEASURES` that the recording has numbers for, and places come in the order of a forward
        pass. A measure that compares with the sample before is not a number in the first sample.

    Raises:
        Nothing of its own.

    Example:
        >>> import tempfile
        >>> from jaxnorm.monitor import Recording, measure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     measure(Recording(folder))
        {}
    """
    return measure_observations(recording.places, recording.observations)


def measure_observations(
    places: Sequence[Place], observations: Mapping[str, Observation]
) -> dict[str, Series]:
    """Measure observations that have a leading axis of samples, as `measure` does."""
    found: dict[str, Series] = {}
    for place in places:
        for name, series in _of_place(observations[place.name], place):
            found.setdefault(name, {})[place.name] = np.asarray(series, np.float64)
    return {name: found[name] for name in MEASURES if name in found}


def quantiles(
    histogram: ArrayLike,
    shares: Sequence[float],
    *,
    edges: ArrayLike = EDGES,
    minimum: ArrayLike = -np.inf,
    maximum: ArrayLike = np.inf,
) -> np.ndarray:
    r"""The values below which these shares of the numbers lie, from counts in bins.

    Within a bin the numbers are taken to be evenly distributed.

    Args:
        histogram: counts, shape (..., bins).
        shares: such as (0.15, 0.5, 0.85), shape (q,).
        edges: between the bins, one fewer than these.
        minimum, maximum: of the numbers, shape (...); they close the first and the last bin, and
            narrow the others. Where they are not finite, a bin without an end counts as its edge.

    Returns:
        Shape (..., q); not a number where nothing was counted.

    Raises:
        ValueError: the edges do not fit the bins.

    Example:
        >>> import numpy as np
        >>> quantiles([0, 4, 4, 0], [0.25, 0.5], edges=[0.0, 1.0, 2.0]).tolist()
        [0.5, 1.0]
    """
    counts, inner = np.asarray(histogram, np.float64), np.asarray(edges, np.float64)
    if not counts.ndim or counts.shape[-1] != len(inner) + 1:
        raise ValueError(
            f"quantiles: there must be one bin more than edges; got counts of shape {counts.shape} "
            f"and {len(inner)} edges. Pass the edges that the numbers were counted between."
        )
    low, high = (
        np.broadcast_to(np.asarray(a, np.float64), counts.shape[:-1])[..., None]
        for a in (minimum, maximum)
    )
    low, high = np.where(np.isfinite(low), low, -np.inf), np.where(np.isfinite(high), high, np.inf)
    inner = np.broadcast_to(inner, (*counts.shape[:-1], len(inner)))
    starts = np.concatenate([np.where(np.isfinite(low), low, inner[..., :1]), inner], -1)
    ends = np.concatenate([inner, np.where(np.isfinite(high), high, inner[..., -1:])], -1)
    # A minimum in a later bin leaves the earlier ones without any number.
    starts, ends = np.clip(starts, low, high), np.clip(ends, low, high)
    after = counts.cumsum(-1)
    total = after[..., -1:]
    found = []
    for share in shares:
        at = (after >= share * total).argmax(-1)[..., None]
        count, end = np.take_along_axis(counts, at, -1), np.take_along_axis(after, at, -1)
        start, stop = np.take_along_axis(starts, at, -1), np.take_along_axis(ends, at, -1)
        within = 1 - (end - share * total) / np.where(count > 0, count, 1)
        found.append(np.where(total > 0, start + within * (stop - start), np.nan))
    return np.concatenate(found, -1)


def _of_place(observation: Observation, place: Place) -> Iterator[tuple[str, ArrayLike]]:
    value = observation.value
    moments = jax.tree.map(np.asarray, value.moments)
    with np.errstate(all="ignore"):  # what diverged is shown as it is
        yield "mean", moments.mean
        yield "deviation", np.sqrt(moments.var)
        now, before = (
            jax.tree.map(lambda a: a[1:], moments),
            jax.tree.map(lambda a: a[:-1], moments),
        )
        yield "mean_drift", later(mean_drift(now, before))
        yield "variance_ratio", later(variance_ratio(now, before))
        yield "kl_divergence", later(kl_divergence(now, before))
        counts = _known(value.histogram)
        now, before = counts[1:], counts[:-1]
        yield "histogram_kl", later(kl_divergence(now, before, histograms=True))
        yield "population_stability_index", later(population_stability_index(now, before))
        yield "skewness", skewness(counts, edges=EDGES)
        yield "excess_kurtosis", excess_kurtosis(counts, edges=EDGES)
        yield from _fields(value, place)
        if observation.gradient is not None:
            yield "gradient_norm", observation.gradient.norm
        if observation.batch is not None:
            yield from _of_batch(observation.batch, place)
        by_channel = observation.batch if observation.channels is None else observation.channels
        if by_channel is not None:
            yield "spread", np.sqrt(by_channel.moments.var).mean(-1)


def _fields(value: Summary, place: Place) -> Iterator[tuple[str, ArrayLike]]:
    yield "minimum", value.minimum
    yield "maximum", value.maximum
    yield "nonfinite", value.nonfinite
    yield "zeros", _known(value.zeros)
    if place.side == "output" and place.kind in FLAT_ENDS:
        yield "saturated", _known(value.saturated)
        yield "dead", _known(value.dead)


def _of_batch(batch: BatchSummary, place: Place) -> Iterator[tuple[str, ArrayLike]]:
    yield "running_kl", running_kl(batch).mean(-1)
    yield "effective_batch", _known(batch.independent)
    epsilon = dict(place.facts).get("epsilon")
    if epsilon is not None:
        yield "near_epsilon", (batch.moments.var < NEAR_EPSILON * epsilon).mean(-1)


def running_kl(batch: BatchSummary) -> np.ndarray:
    """Divergence of each channel's batch from its running statistics, in nats; (samples, c)."""
    mean, var = jnp.asarray(batch.running_mean), jnp.asarray(batch.running_var)
    return np.asarray(kl_divergence(batch.moments, Moments(jnp.ones_like(var), mean, var)))


def later(series: ArrayLike) -> np.ndarray:
    """A measure without a value for the first sample, before which there is none."""
    return np.concatenate([[np.nan], np.asarray(series, np.float64)])


def _known(array: ArrayLike | None) -> np.ndarray:
    """A field that is never None here: those of values, and of whole batches."""
    assert array is not None
    return np.asarray(array)
