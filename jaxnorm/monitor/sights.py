"""What was seen in one run of a program."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import struct

from jaxnorm.monitor.marks import Place
from jaxnorm.monitor.summary import BatchSummary, Summary


class Sight(NamedTuple):
    """What one place showed; None for what there was not."""

    value: Summary
    gradient: Summary | None = None
    batch: BatchSummary | None = None
    """Of the input of a batch norm."""
    channels: Summary | None = None
    """Of each channel of the value, shape (c,)."""
    channel_gradients: Summary | None = None
    """Of each channel of the gradient."""


class Sights(struct.PyTreeNode):
    """What all places showed; those of one place by its name, as of a dictionary."""

    values: Summary
    """With an axis of places."""
    gradients: Summary | None
    batches: dict[str, BatchSummary]
    channels: dict[str, Summary]
    channel_gradients: dict[str, Summary]
    places: tuple[Place, ...] = struct.field(pytree_node=False)
    """In the order in which a forward pass comes by."""
    with_gradient: tuple[str, ...] = struct.field(pytree_node=False)
    """Names of the places that `gradients` are of."""

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
