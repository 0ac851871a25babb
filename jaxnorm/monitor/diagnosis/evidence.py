"""The evidence for rules: a run's samples, or one observation of a model, in the same form."""

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
from jaxnorm.monitor.probe.observations import Sight, Sights
from jaxnorm.monitor.probe.summary import BatchSummary
from jaxnorm.monitor.samples.measures import Seen, Series, measure
from jaxnorm.monitor.samples.schema import ParameterSummary
from jaxnorm.monitor.samples.shift import kl_divergence


@dataclass(frozen=True)
class Look:
    """One look at a model, read like a recording of a single sample."""

    sights: Sights
    steps: np.ndarray
    metrics: Mapping[str, np.ndarray]
    parameters: Mapping[str, ParameterSummary]

    @classmethod
    def of(cls, sights: Sights) -> Look:
        """At what was seen."""
        return cls(sights, np.zeros(1, np.int64), {}, {})

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that were observed."""
        return self.sights.places

    def __getitem__(self, name: str) -> Sight:
        """The observation of one place, with an axis of one sample."""
        return jax.tree.map(lambda a: np.asarray(a)[None], self.sights[name])


LEAST_INDEPENDENT = 16
"""Independent numbers behind a channel's statistics: with fewer, a deviation is off by more than
1/sqrt(2 * 16) = 18 %, and nothing is judged by it."""


@dataclass(frozen=True)
class Norm:
    """A batch norm's input."""

    place: Place
    facts: Mapping[str, Any]
    batch: BatchSummary

    @property
    def frozen(self) -> bool:
        """True if a norm normalizes by its running statistics."""
        return bool(self.facts.get("use_running_average"))

    @cached_property
    def skew(self) -> np.ndarray:
        """The distance of each sample's batch from the running statistics; see `apart`.

        0 where there are too few numbers to tell.
        """
        mean, var = jnp.asarray(self.batch.running_mean), jnp.asarray(self.batch.running_var)
        skew = apart(self.batch.moments, Moments(jnp.ones_like(var), mean, var), self.noise)
        return np.where(self.noise > 2 / LEAST_INDEPENDENT, 0, skew)

    @cached_property
    def noise(self) -> np.ndarray:
        """The value of `apart` by chance, with so many independent numbers: two over that."""
        looked_at = np.asarray(self.batch.moments.count)[:, 0]
        return 2 / np.maximum(np.minimum(looked_at, np.asarray(self.batch.independent)), 1)


@dataclass(frozen=True)
class Evidence:
    """All that was seen, as far as it was finite, and measures of it."""

    seen: Seen

    @cached_property
    def measures(self) -> dict[str, Series]:
        """As `measure` gives them."""
        return measure(self.seen)

    @cached_property
    def facts(self) -> dict[str, dict[str, Any]]:
        """The facts that are known of each place."""
        return {place.name: dict(place.facts) for place in self.seen.places}

    @cached_property
    def norms(self) -> list[Norm]:
        """Inputs of batch norms that have running statistics, in order."""
        return [
            Norm(place, self.facts[place.name], batch)
            for place in self.seen.places
            if (batch := self.seen[place.name].batch) is not None
        ]

    @cached_property
    def healthy(self) -> int:
        """Samples before the first in which a value, a gradient or the loss is not finite."""
        counts = [len(self.seen.steps)]
        for series in self._broken():
            counts.append(int(series.argmax()) if series.any() else len(series))
        return min(counts)

    def _broken(self) -> Iterator[np.ndarray]:
        for share in self.measures.get("nonfinite", {}).values():
            yield share > 0
        for place in self.seen.places:
            gradient = self.seen[place.name].gradient
            if gradient is not None:
                yield np.asarray(gradient.nonfinite) > 0
        # Of other metrics it may be meant.
        if "loss" in self.seen.metrics:
            yield ~np.isfinite(np.asarray(self.seen.metrics["loss"]))

    def late(self, series: ArrayLike) -> np.ndarray:
        """Its second half, as far as all was finite: the start of a run is not judged by."""
        return np.asarray(series)[self.healthy // 2 : self.healthy]

    def typical(self, series: ArrayLike) -> float:
        """The median of the second half; not a number where there is none."""
        late = self.late(series).astype(np.float64)
        late = late[np.isfinite(late)]
        return float(np.median(late)) if len(late) else float("nan")


def apart(now: Moments, then: Moments, noise: np.ndarray) -> np.ndarray:
    r"""The distance of a batch's channels from some statistics, median over channels.

    .. math:: \operatorname{median}_c\; D(p_c \| q_c) + D(q_c \| p_c)

    of normal distributions: the population stability index without bins. What chance alone brings
    is taken off. A few channels that are hardly ever other than zero, of which a batch tells
    nothing, do not count.

    Args:
        now, then: shape (samples, c).
        noise: what chance brings, shape (samples,).

    Returns:
        Shape (samples,), not negative, in nats.
    """
    both = np.asarray(kl_divergence(now, then)) + np.asarray(kl_divergence(then, now))
    far = np.minimum(np.nan_to_num(both, nan=_FAR, posinf=_FAR), _FAR)
    return np.maximum(np.median(far, -1) - noise, 0)


_FAR = 10.0  # nats; infinite between constant channels
