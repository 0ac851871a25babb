"""Samples wait on the device, in a ring, until somebody reads them all at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from jaxnorm.monitor.samples.schema import Schema


class Buffer(struct.PyTreeNode):
    """The last samples of a run, in a ring on the device.

    Attributes:
        rows: the samples. There is one row more than samples are kept: the next sample's is free.
        steps: the step of each row.
        written: the number of samples ever written.
        schema: the meaning of a row; not a leaf of the pytree.
    """

    rows: Float[Array, "rows width"]  # float32
    steps: Int[Array, " rows"]  # int32
    written: Int[Array, ""]  # int32, shape ()
    schema: Schema = struct.field(pytree_node=False)

    @classmethod
    def empty(cls, schema: Schema, capacity: int) -> Buffer:
        """An empty buffer with room for so many samples."""
        return cls(
            jnp.zeros((capacity + 1, schema.width), jnp.float32),
            jnp.zeros((capacity + 1,), jnp.int32),
            jnp.zeros((), jnp.int32),
            schema,
        )

    @property
    def capacity(self) -> int:
        """The number of samples that are kept."""
        return self.steps.shape[0] - 1

    def push(self, step: Int[Array, ""], row: Float[Array, " width"], taken: Any) -> Buffer:
        """A buffer with one more sample, in place of the oldest where there is no room.

        One that was not taken is written all the same, where no sample is: of a buffer that goes
        through a branch, compilers make a copy at every step.
        """
        place = self.written % self.steps.shape[0]
        return self.replace(
            rows=lax.dynamic_update_index_in_dim(self.rows, row, place, 0),
            steps=lax.dynamic_update_index_in_dim(self.steps, step.astype(jnp.int32), place, 0),
            written=self.written + jnp.asarray(taken, jnp.int32),
        )

    def read(self, since: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
        """Samples from the `since`-th on: their steps, their rows, and how many were overwritten.

        Waits for the device, and copies all at once.
        """
        written = int(_here(self.written))
        first = max(since, written - self.capacity)
        order = np.arange(first, written) % self.steps.shape[0]
        return _here(self.steps)[order], _here(self.rows)[order], max(0, first - since)


def _here(array: Array) -> np.ndarray:
    """An array that is whole on every device, of which this process may see but some."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = array.addressable_data(0)
    return np.asarray(array)
