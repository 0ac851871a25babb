"""Observations of one run of a program."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import struct

from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.summary import BatchSummary, Summary


class Sight(NamedTuple):
    """Summaries of one place in a model; None where there is nothing to summarize.

    Attributes:
        value: of the array at this place.
        gradient: of the loss's gradient with respect to it; None where none was taken.
        batch: of the input of a batch norm, by channel; None at other places.
        channels: of each channel of the value, shape (c,); None unless `channels` was asked for.
        channel_gradients: of each channel of the gradient, likewise.
    """

    value: Summary
    gradient: Summary | None = None
    batch: BatchSummary | None = None
    channels: Summary | None = None
    channel_gradients: Summary | None = None


class Sights(struct.PyTreeNode):
    """Summaries of all places in a model; a dictionary from names of places to a `Sight` each.

    Attributes:
        values: of the arrays at all places, with an axis of places.
        gradients: of the gradients, with an axis of the places in `with_gradient`; or None.
        batches: name of a place -> summary of a batch norm's input, by channel.
        channels: name of a place -> summaries of each channel of the value, shape (c,).
        channel_gradients: name of a place -> summaries of each channel of the gradient.
        places: in the order of a forward pass; not a part of the pytree's leaves.
        with_gradient: names of the places that `gradients` has an entry for, likewise.
    """

    values: Summary
    gradients: Summary | None
    batches: dict[str, BatchSummary]
    channels: dict[str, Summary]
    channel_gradients: dict[str, Summary]
    places: tuple[Place, ...] = struct.field(pytree_node=False)
    with_gradient: tuple[str, ...] = struct.field(pytree_node=False)

    def __getitem__(self, name: str) -> Sight:
        at = [place.name for place in self.places].index(name)
        gradient = None
        if self.gradients is not None and name in self.with_gradient:
            i = self.with_gradient.index(name)
            gradient = jax.tree.map(lambda a: a[i], self.gradients)
        value = jax.tree.map(lambda a: a[at], self.values)
        return Sight(
            value,
            gradient,
            self.batches.get(name),
            self.channels.get(name),
            self.channel_gradients.get(name),
        )

    def __iter__(self):
        return (place.name for place in self.places)

    def __len__(self) -> int:
        return len(self.places)
