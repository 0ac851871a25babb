"""The assignment of PyTorch's weights to Flax's variables, which prints as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jaxnorm.text import aligned
from jaxnorm.tools.torch.layouts import ArrayLayout
from jaxnorm.tools.torch.targets import Path


@dataclass(frozen=True)
class Move:
    """One array of Flax and the array of PyTorch that it comes from.

    Attributes:
        key: name in the state dict.
        path: path in the tree of variables.
        layout: how the one becomes the other.
    """

    key: str
    path: Path
    layout: ArrayLayout


@dataclass(frozen=True)
class TorchAssignment:
    """The whole assignment of a state dict to a Flax model.

    Attributes:
        moves: one for each array of Flax that is given a value.
        notes: what was decided, left aside, or could not be checked.
        arrays: PyTorch's arrays by name, those that go nowhere included.
        order: names of the state dict, in its order.
    """

    moves: tuple[Move, ...]
    notes: tuple[str, ...] = ()
    arrays: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    order: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Move]:
        return iter(self.moves)

    def __len__(self) -> int:
        return len(self.moves)

    def __str__(self) -> str:
        rows = [("torch", "shape", "flax", "shape", "how")]
        rows += [
            (
                move.key,
                str(move.layout.torch_shape),
                "/".join(move.path),
                str(move.layout.flax_shape),
                move.layout.how,
            )
            for move in self.moves
        ]
        return "\n".join([aligned(rows), *(f"- {note}" for note in self.notes)])
