"""The evidence for rules: the samples of a run, or one observation of a model, in one form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxnorm.core.moments import Moments
from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.observations import Observation, Observations
from jaxnorm.monitor.probe.summary import BatchSummary
from jaxnorm.monitor.samples.measures import Series, measure_observations
from jaxnorm.monitor.samples.recording import Recording
from jaxnorm.monitor.samples.schema import ParameterSummary
from jaxnorm.monitor.samples.shift import kl_divergence

LEAST_INDEPENDENT = 16
"""Independent numbers behind a channel's statistics: with fewer, a deviation is off by more than
1/sqrt(2 * 16) = 18 %, and nothing is judged by it."""

_FAR = 10.0  # nats; between constant channels the divergence is infinite


@dataclass(frozen=True)
class Evidence:
    """All samples of a run, and measures of them.

    Attributes:
        steps: the sampled steps.
        places: the places that were observed, in the order of a forward pass.
        observations: name of a place -> its observation; each array has a leading axis of samples.
        metrics: the loss and other numbers of each step.
        parameters: path of an array of parameters -> its norms.
    """

    steps: np.ndarray  # int64, shape (samples,)
    places: tuple[Place, ...]
    observations: Mapping[str, Observation]  # float32, shape (samples, ...)
    metrics: Mapping[str, np.ndarray]  # float32, shape (samples,) each
    parameters: Mapping[str, ParameterSummary]  # float32, shape (samples,) each

    @classmethod
    def of_recording(cls, recording: Recording) -> Evidence:
        """The evidence of a run."""
        return cls(
            recording.steps,
            recording.places,
            recording.observations,
            recording.metrics,
            recording.parameters,
        )

    @classmethod
    def of_observations(cls, observations: Observations) -> Evidence:
        """The evidence of one pass through a model, as a run of a single sample."""
        found = {
            name: jax.tree.map(lambda a: np.asarray(a)[None], observations[name])
            for name in observations
        }
        return cls(np.zeros(1, np.int64), observations.places, found, {}, {})

    @cached_property
    def measures(self) -> dict[str, Series]:
        """The measures of all places, as `measure` gives them."""
        return measure_observations(self.places, self.observations)

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """The facts that are known of each place."""
        return {place.name: dict(place.facts) for place in self.places}

    @cached_property
    def batches(self) -> dict[str, BatchSummary]:
        """The inputs of batch norms that have running statistics, by the name of the place."""
        found = ((name, each.batch) for name, each in self.observations.items())
        return {name: batch for name, batch in found if batch is not None}

    @cached_property
    def batch_norms(self) -> list[Place]:
        """The places of `batches`, in the order of a forward pass."""
        return [place for place in self.places if place.name in self.batches]

    @cached_property
    def train_eval_divergence(self) -> Series:
        """The divergence of each sample's batch from the running statistics, less `noise`.

        By the name of the place, shape (samples,), in nats. It is 0 where there are too
        few numbers to tell.
        """
        found = {}
        for name, batch in self.batches.items():
            mean, var = jnp.asarray(batch.running_mean), jnp.asarray(batch.running_var)
            running, noise = Moments(jnp.ones_like(var), mean, var), self.noise[name]
            divergence = symmetric_divergence(batch.moments, running, noise)
            found[name] = np.where(noise > 2 / LEAST_INDEPENDENT, 0, divergence)
        return found

    @cached_property
    def noise(self) -> Series:
        """The divergence that chance alone brings: two over the number of independent numbers."""
        found = {}
        for name, batch in self.batches.items():
            sampled = np.asarray(batch.moments.count)[:, 0]
            found[name] = 2 / np.maximum(np.minimum(sampled, np.asarray(batch.independent)), 1)
        return found

    def is_frozen(self, place: Place) -> bool:
        """True if a batch norm normalizes by its running statistics."""
        return bool(self.facts[place.name].get("use_running_average"))

    @cached_property
    def healthy(self) -> int:
        """The number of samples before the first value, gradient or loss that is not finite."""
        counts = [len(self.steps)]
        for series in self._broken():
            counts.append(int(series.argmax()) if series.any() else len(series))
        return min(counts)

    def _broken(self) -> Iterator[np.ndarray]:
        for share in self.measures.get("nonfinite", {}).values():
            yield share > 0
        for place in self.places:
            gradient = self.observations[place.name].gradient
            if gradient is not None:
                yield np.asarray(gradient.nonfinite) > 0
        # Another metric may be infinite on purpose.
        if "loss" in self.metrics:
            yield ~np.isfinite(np.asarray(self.metrics["loss"]))

    def late(self, series: ArrayLike) -> np.ndarray:
        """The second half of the healthy samples: a run is not judged by its start."""
        return np.asarray(series)[self.healthy // 2 : self.healthy]

    def typical(self, series: ArrayLike) -> float:
        """The median of the second half; not a number where there is none."""
        late = self.late(series).astype(np.float64)
        late = late[np.isfinite(late)]
        return float(np.median(late)) if len(late) else float("nan")


def symmetric_divergence(now: Moments, then: Moments, noise: np.ndarray) -> np.ndarray:
    r"""The divergence between the channels of two batches, median over channels.

    .. math:: \operatorname{median}_c\; D(p_c \| q_c) + D(q_c \| p_c)

    for normal distributions: the population stability index without bins. The median leaves out a
    few channels that are hardly ever other than zero, about which a batch tells nothing.

    Args:
        now: moments, shape (samples, c).
        then: moments to compare them with, shape (samples, c).
        noise: the divergence that chance brings, which is subtracted; shape (samples,).

    Returns:
        Shape (samples,), not negative, in nats.
    """
    both = np.asarray(kl_divergence(now, then)) + np.asarray(kl_divergence(then, now))
    far = np.minimum(np.nan_to_num(both, nan=_FAR, posinf=_FAR), _FAR)
    return np.maximum(np.median(far, -1) - noise, 0)
