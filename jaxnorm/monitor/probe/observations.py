"""Observations of one run of a program, as `observe` returns them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
from flax import struct

from jaxnorm.monitor.probe.marks import Place
from jaxnorm.monitor.probe.summary import BatchSummary, Summary


class Observation(NamedTuple):
    """Summaries of one place in a model; None where there is nothing to summarize.

    In a recording each array has a leading axis of samples.

    Attributes:
        value: summary of the array at this place.
        gradient: summary of the loss's gradient with respect to it; None where none was taken.
        batch: summary of a batch norm's input, by channel; None at other places.
        channels: summaries of each channel of the value; None unless `channels` was asked for.
        channel_gradients: summaries of each channel of the gradient, likewise.
    """

    value: Summary  # float32, shape () each
    gradient: Summary | None = None  # float32, shape () each
    batch: BatchSummary | None = None  # float32, shape () and (c,)
    channels: Summary | None = None  # float32, shape (c,) each
    channel_gradients: Summary | None = None  # float32, shape (c,) each


class Observations(struct.PyTreeNode):
    """A dictionary from the names of all places in a model to an `Observation` each.

    Attributes:
        values: summaries of the arrays at all places.
        gradients: summaries of the gradients at the places in `with_gradient`; or None.
        batches: name of a place -> summary of a batch norm's input, by channel.
        channels: name of a place -> summaries of each channel of the value.
        channel_gradients: name of a place -> summaries of each channel of the gradient.
        places: the places in the order of a forward pass; not a leaf of the pytree.
        with_gradient: names of the places that `gradients` has an entry for; not a leaf either.
    """

    values: Summary  # float32, shape (places,) each
    gradients: Summary | None  # float32, shape (places with gradient,) each
    batches: dict[str, BatchSummary]  # float32, shape () and (c,)
    channels: dict[str, Summary]  # float32, shape (c,) each
    channel_gradients: dict[str, Summary]  # float32, shape (c,) each
    places: tuple[Place, ...] = struct.field(pytree_node=False)
    with_gradient: tuple[str, ...] = struct.field(pytree_node=False)

    def __getitem__(self, name: str) -> Observation:
        at = [place.name for place in self.places].index(name)
        gradient = None
        if self.gradients is not None and name in self.with_gradient:
            i = self.with_gradient.index(name)
            gradient = jax.tree.map(lambda a: a[i], self.gradients)
        return Observation(
            jax.tree.map(lambda a: a[at], self.values),
            gradient,
            self.batches.get(name),
            self.channels.get(name),
            self.channel_gradients.get(name),
        )

    def __iter__(self) -> Iterator[str]:
        return (place.name for place in self.places)

    def __len__(self) -> int:
        return len(self.places)
