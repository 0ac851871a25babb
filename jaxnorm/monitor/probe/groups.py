"""Observations on their way out of the programs in which they were made.

A scan, a branch and a `shard_map` return a `Group` as they return any pytree. Places whose arrays
have one shape stay together in it, because each operation on a small array costs time.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxnorm.monitor.probe.subsample import gather_parts
from jaxnorm.monitor.probe.summary import BatchSummary, Summary

Key = tuple[str, str]
"""Name of a place, and the role of what was seen there."""


class Group(struct.PyTreeNode):
    """Summaries of several places, before the parts of the batch are put together.

    Attributes:
        role: `VALUE` or `GRADIENT`.
        names: names of the places.
        summary: of the arrays, with an axis of parts and one of places.
        batches: name -> summary of a batch norm's input, with an axis of parts.
        channels: name -> summaries of the channels, with an axis of parts and one of channels.
    """

    role: str = struct.field(pytree_node=False)
    names: tuple[str, ...] = struct.field(pytree_node=False)
    summary: Summary  # float32, shape (parts, places)
    batches: dict[str, BatchSummary]  # float32, shape (parts,) and (parts, c)
    channels: dict[str, Summary]  # float32, shape (parts, c)

    @property
    def keys(self) -> list[Key]:
        """Name and role of each place."""
        return [(name, self.role) for name in self.names]

    def pooled(self) -> Group:
        """Pool over a leading axis that all arrays have."""
        return self.replace(
            summary=self.summary.pooled(),
            batches={name: batch.pooled() for name, batch in self.batches.items()},
            channels={name: channels.pooled() for name, channels in self.channels.items()},
        )

    def completed(self) -> Group:
        """Put the parts of the batch together; their axis is gone then."""
        return self.replace(
            summary=self.summary.completed(),
            batches={name: batch.completed() for name, batch in self.batches.items()},
            channels={name: channels.completed() for name, channels in self.channels.items()},
        )

    def select(self, names: list[str]) -> Group:
        """The group of some of the places."""
        return Group(
            self.role,
            tuple(names),
            self.summary.take([self.names.index(name) for name in names], 1),
            {name: self.batches[name] for name in names if name in self.batches},
            {name: self.channels[name] for name in names if name in self.channels},
        )


def without_repetitions(groups: list[Group]) -> list[Group]:
    """Groups in which each place is only once: what `remat` computes again has been seen before."""
    known: set[Key] = set()
    found = []
    for group in groups:
        new = group.select([name for name, role in group.keys if (name, role) not in known])
        known |= set(new.keys)
        found += [new] if new.names else []
    return found


def completed_groups(groups: list[Group]) -> list[Group]:
    """Groups of whole batches; one collective brings the parts together, if there are several."""
    return [group.completed() for group in gather_parts(groups)]


def by_key(groups: list[Group]) -> dict[Key, Group]:
    """Each place in a group of its own."""
    return {key: group.select([key[0]]) for group in groups for key in group.keys}


def empty_group(shapes: Group) -> Group:
    """The group of no elements, for a branch in which this place does not occur.

    Args:
        shapes: a group of `jax.ShapeDtypeStruct`.
    """
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    channels = {name: _without_range(summary) for name, summary in zeros.channels.items()}
    return zeros.replace(summary=_without_range(zeros.summary), channels=channels)


def _without_range(zeros: Summary) -> Summary:
    return zeros._replace(
        minimum=jnp.full_like(zeros.minimum, jnp.inf),
        maximum=jnp.full_like(zeros.maximum, -jnp.inf),
    )


def stack_summaries(groups: list[Group]) -> Summary:
    """The summaries of all places of completed groups, with an axis of places."""
    if len(groups) == 1:
        return groups[0].summary
    arrays: Any = [group.summary for group in groups]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *arrays)
