"""Observations of some places, on their way out of the programs around them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnorm.monitor.probe.subsample import whole
from jaxnorm.monitor.probe.summary import BatchParts, Summary, finished


class Detail(NamedTuple):
    """The details of one place by channel, with an axis of parts of the batch.

    None for what is not looked at.
    """

    batch: BatchParts | None = None
    channels: Summary | None = None

    def pooled(self) -> Detail:
        """Observations pooled over the leading axis."""
        return Detail(
            None if self.batch is None else self.batch.pooled(),
            None if self.channels is None else self.channels.pooled(),
        )


class Part(NamedTuple):
    """The observations of some places together."""

    role: str
    names: tuple[str, ...]
    summary: Summary
    """With an axis of parts of the batch, and one of places."""
    details: dict[str, Detail]
    """Of the places that have any."""

    @property
    def arrays(self) -> tuple[Summary, dict[str, Detail]]:
        """All but the names."""
        return self.summary, self.details

    def of(self, arrays: tuple[Summary, dict[str, Detail]]) -> Part:
        """Other numbers of the same places."""
        return self._replace(summary=arrays[0], details=arrays[1])

    def pooled(self) -> Part:
        """Over an axis that came before that of the places."""
        details = {name: detail.pooled() for name, detail in self.details.items()}
        return self._replace(summary=self.summary.pooled(), details=details)

    def without(self, known: set[tuple[str, str]]) -> Part:
        """Only what is not known yet."""
        keep = [i for i, name in enumerate(self.names) if (name, self.role) not in known]
        names = tuple(self.names[i] for i in keep)
        details = {name: d for name, d in self.details.items() if name in names}
        return Part(self.role, names, self.summary.take(keep, 1), details)


def whole_parts(parts: list[Part]) -> list[Part]:
    """Parts of the batch put together, whose axis is gone; in one collective, if at all."""
    arrays = whole([part.arrays for part in parts])
    found = []
    for part, (summary, details) in zip(parts, arrays):
        details = {name: _pooled(detail) for name, detail in details.items()}
        found.append(part.of((finished(_pooled(summary)), details)))
    return found


def by_name(parts: list[Part]) -> dict[tuple[str, str], Any]:
    """Each place's numbers alone, by its name and its role."""
    return {
        (name, part.role): (part.summary.take([i], 1), part.details.get(name, Detail()))
        for part in parts
        for i, name in enumerate(part.names)
    }


def from_names(found: dict[tuple[str, str], Any]) -> list[Part]:
    """The parts that `by_name` took apart."""
    return [
        Part(role, (name,), summary, {} if detail == Detail() else {name: detail})
        for (name, role), (summary, detail) in found.items()
    ]


def nothing(shape: Any) -> Any:
    """The summary of no elements, for a branch that has no such place."""
    summary, detail = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shape)
    channels = None if detail.channels is None else _of_none(detail.channels)
    return _of_none(summary), detail._replace(channels=channels)


def _of_none(zeros: Summary) -> Summary:
    return zeros._replace(
        minimum=jnp.full_like(zeros.minimum, jnp.inf),
        maximum=jnp.full_like(zeros.maximum, -jnp.inf),
    )


def _pooled(found: Any) -> Any:
    """A summary or a detail of all parts of the batch; of a single one it is that one's."""
    parts = jax.tree.leaves(found)[0].shape[0]
    return found.pooled() if parts > 1 else jax.tree.map(lambda a: a[0], found)
