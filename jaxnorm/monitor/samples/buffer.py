"""The ring on the device in which samples wait until the host reads them all at once."""

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
        """A buffer with one more sample, which replaces the oldest if there is no room.

        Args:
            step: the step of the sample, int32 of shape ().
            row: the numbers of the sample, float32 of shape (width,).
            taken: False if there is no sample. The row is written all the same, where no sample
                is: compilers copy a buffer that goes through a branch, at every step.
        """
        place = self.written % self.steps.shape[0]
        return self.replace(
            rows=lax.dynamic_update_index_in_dim(self.rows, row, place, 0),
            steps=lax.dynamic_update_index_in_dim(self.steps, step.astype(jnp.int32), place, 0),
            written=self.written + jnp.asarray(taken, jnp.int32),
        )

    def read(self, since: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
        """Read the samples from the `since`-th on.

        It waits for the device, and copies all samples at once.

        Returns:
            Their steps, int32 of shape (samples,); their rows, float32 of shape (samples, width);
            and the number of samples that were overwritten.
        """
        written = int(_here(self.written))
        first = max(since, written - self.capacity)
        order = np.arange(first, written) % self.steps.shape[0]
        return _here(self.steps)[order], _here(self.rows)[order], max(0, first - since)


def _here(array: Array) -> np.ndarray:
    """Copy to the host an array that is whole on every device, whoever owns the other devices."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = array.addressable_data(0)
    return np.asarray(array)
